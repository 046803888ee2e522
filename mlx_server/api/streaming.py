"""Answers that take their time: a stream of events, or one body after a long wait.

Both hold their generation inside their own call, so that every ending closes it: finished, failed,
client gone before or after the first byte, server stopping, task cancelled.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn

from sse_starlette import EventSourceResponse
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mlx_server.api.errors import error_body, stream_error
from mlx_server.config import Settings
from mlx_server.errors import Unavailable

DONE = b"data: [DONE]\n\n"
STOP_MARGIN = 1.5
"""Seconds by which a stream ends before the HTTP server would cut it."""


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
        async with while_connected(receive):
            body = await self._body()
        if body is not None:
            await Response(body, media_type="application/json")(scope, receive, send)


class StreamedAnswer(Response):
    """Streams what `opened` yields: server-sent events, already encoded.

    An error raised while opening is an ordinary answer with its status; one raised by the stream
    becomes its last event. A server that stops cuts the stream after `grace` seconds.
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
        # A little before the HTTP server's own end of patience, to have the last word.
        self._grace = settings.grace_period - STOP_MARGIN if grace is None else grace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with while_connected(receive) as stop_watching, self._opened as events:
            response = _EventStream(
                self._until_the_end(events, stop_watching),
                ping=self._settings.ping_interval,
                sep="\n",
                shutdown_grace_period=max(0.0, self._grace),
            )
            await response(scope, _never, send)
            if response.active:
                # The grace period of a stopping server has run out.
                stop_watching()
                error = Unavailable("The server is stopping.", code="server_stopping")
                last = sse(error_body(error))
                await send({"type": "http.response.body", "body": last, "more_body": False})

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
    """sse-starlette's response without a cancel scope around every event it sends."""

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)  # no timeout is set


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
