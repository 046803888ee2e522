"""Answers that take their time: a stream of events, or one body after a long wait.

Both hold their generation inside their own call, so that every ending closes it: finished, failed,
client gone before or after the first byte, server stopping, task cancelled.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn, cast

from sse_starlette import EventSourceResponse
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mlx_server.api.http.failures import error_body, stream_error
from mlx_server.api.http.stopping import ServerStopping, Stopping
from mlx_server.config import Settings

DONE = b"data: [DONE]\n\n"


def sse(data: bytes) -> bytes:
    """An event whose data is `data`, which must be a single line, as JSON is."""
    return b"data: " + data + b"\n\n"


class WholeAnswer(Response):
    """Awaits its JSON body for as long as the client waits too."""

    def __init__(self, body: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__(media_type="application/json")
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: bytes | None = None
        async with _stopping(scope).limited(), while_connected(receive):
            body = await self._body()
        if body is not None:
            await Response(body, media_type="application/json")(scope, receive, send)


class StreamedAnswer(Response):
    """Streams what `opened` yields: server-sent events, already encoded.

    An error raised while opening is an ordinary answer with its status; one raised by the stream
    becomes its last event. A server that stops ends the stream after `grace` seconds, and says so;
    None is the grace that all work gets.
    """

    def __init__(
        self,
        opened: AbstractAsyncContextManager[AsyncIterator[bytes]],
        settings: Settings,
        request_id: str,
        grace: float | None = None,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._opened = opened
        self._settings = settings
        self._request_id = request_id
        self._grace = grace
        self._response: _EventStream | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with while_connected(receive) as stop_watching:
            try:
                async with _stopping(scope).limited(self._grace):
                    await self._send_events(scope, send, stop_watching)
            except ServerStopping as error:
                if self._response is None:
                    raise
                if not self._response.active:
                    return
                stop_watching()
                last = sse(error_body(error))
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_events(
        self, scope: Scope, send: Send, stop_watching: Callable[[], object]
    ) -> None:
        async with self._opened as events:
            self._response = _EventStream(
                self._until_the_end(events, stop_watching),
                ping=self._settings.ping_interval,
                sep="\n",
            )
            await self._response(scope, _never, send)

    async def _until_the_end(
        self, events: AsyncIterator[bytes], stop_watching: Callable[[], object]
    ) -> AsyncIterator[bytes]:
        """The events, or those before an error and what the client is told of it."""
        try:
            async for data in events:
                yield data
        except Exception as error:  # noqa: BLE001
            # Told to the client here, and logged if it was not expected.
            yield sse(error_body(stream_error(error, self._request_id)))
        # Next comes the end of the answer, which a server may report as a disconnect.
        stop_watching()


class _EventStream(EventSourceResponse):
    """sse-starlette's response without a cancel scope around every event it sends, and without
    its own watch for the server's end."""

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)  # api.connection knows when a client takes nothing

    async def _listen_for_exit_signal_with_grace(self) -> None:
        await _never()  # api.stopping ends the stream


def _stopping(scope: Scope) -> Stopping:
    return cast(Stopping, scope["app"].state.stopping)


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[Callable[[], object]]:
    """Cancels the block when the client goes away, and then leaves it quietly.

    Yields what ends the watch.

    The body must have been received. A timeout is used for its exact cancellation: it interrupts
    the block once, and clean-up in it may wait.
    """
    try:
        async with asyncio.timeout(None) as limit:
            watcher = asyncio.create_task(_expire_on_disconnect(receive, limit))
            try:
                yield watcher.cancel
            finally:
                watcher.cancel()
    except TimeoutError:
        if not limit.expired():
            raise


async def _expire_on_disconnect(receive: Receive, limit: asyncio.Timeout) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            limit.reschedule(asyncio.get_running_loop().time())
            return


async def _never() -> NoReturn:
    """A `receive` for those who need not watch the client: `while_connected` does."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError
