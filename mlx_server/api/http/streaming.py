"""Long answers: an event stream, or one body after a wait. Each holds its generation within its own
call, so that every exit closes it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn, cast

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mlx_server.api.http.failures import failure_of
from mlx_server.api.http.stopping import ServerStopping, Stopping
from mlx_server.api.http.wire import Failure, StreamEvent, wire_of
from mlx_server.config import Settings

PING = b"ping"
"""Stands for a ping until it is sent."""


class WholeAnswer(Response):
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
    """Streams the batches that `opened` yields. An error while opening gets an ordinary answer with
    its status; a later one becomes the last event. A stopping server ends the stream with an error
    after `grace` seconds, or the default. `idle` gives an event without content, `failed` the last
    one of a stream that broke.
    """

    def __init__(
        self,
        opened: AbstractAsyncContextManager[AsyncIterator[Iterable[StreamEvent]]],
        grace: float | None = None,
        idle: Callable[[], StreamEvent] | None = None,
        failed: Callable[[Failure], StreamEvent] | None = None,
    ) -> None:
        super().__init__()
        self._opened = opened
        self._grace = grace
        self._idle = idle
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        frames = _Frames(scope, self._idle, self._failed)
        stream: _EventStream | None = None
        async with while_connected(receive) as stop_watching:
            try:
                async with _stopping(scope).limited(self._grace), self._opened as events:
                    stream = _EventStream(_until_the_end(events, frames, stop_watching), frames)
                    await stream(scope, _never, send)
            except ServerStopping as error:
                if stream is None:
                    raise
                if stream.active:
                    stop_watching()
                    last = frames.failure(error)
                    await send({"type": "http.response.body", "body": last, "more_body": False})


class _EventStream(EventSourceResponse):
    """sse-starlette's response without its cancel scope per event and its own shutdown watch."""

    def __init__(self, content: AsyncIterator[bytes], frames: "_Frames") -> None:
        super().__init__(
            content,
            media_type=frames.media_type,
            ping=frames.ping_interval,
            ping_message_factory=lambda: cast(ServerSentEvent, PING),  # passes unchanged
        )
        self._frames = frames
        self._sending = asyncio.Lock()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Events get their numbers as they are made, and are sent in that order: a ping, made here,
        comes whole between two others, and not while one is on its way.
        """
        if message.get("body") is PING:
            if self._sending.locked():
                return
            message = {**message, "body": self._frames.ping()}
        async with self._sending:
            await send(message)  # api.http.connection handles clients that stop reading

    async def _listen_for_exit_signal_with_grace(self) -> None:
        await _never()  # api.http.stopping ends the stream


class _Frames:
    def __init__(
        self,
        scope: Scope,
        idle: Callable[[], StreamEvent] | None,
        failed: Callable[[Failure], StreamEvent] | None = None,
    ) -> None:
        self._scope = scope
        self._wire = wire_of(scope)
        self._settings = cast(Settings, scope["app"].state.settings)
        self._idle = idle
        self._failed = failed or self._wire.error_event
        self._count = 0

    @property
    def end(self) -> bytes:
        return self._wire.end

    @property
    def media_type(self) -> str:
        return self._wire.media_type

    @property
    def ping_interval(self) -> float:
        """Seconds; 0 for no pings."""
        silent = self._settings.ping == "none" or not (self._wire.ping or self._idle)
        return 0 if silent else min(self._settings.ping_interval, self._wire.longest_silence)

    def ping(self) -> bytes:
        asked = self._settings.ping == "chunk" or not self._wire.ping
        return self._framed(self._idle()) if asked and self._idle is not None else self._wire.ping

    def join(self, events: Iterable[StreamEvent]) -> bytes:
        return b"".join([self._framed(event) for event in events])

    def failure(self, error: Exception) -> bytes:
        return self._framed(self._failed(failure_of(error, self._scope)))

    def _framed(self, event: StreamEvent) -> bytes:
        number = self._count
        self._count += 1
        return self._wire.frame(event, number)


async def _until_the_end(
    events: AsyncIterator[Iterable[StreamEvent]],
    frames: _Frames,
    stop_watching: Callable[[], object],
) -> AsyncIterator[bytes]:
    try:
        async for together in events:
            # Each send has a cost: send together what arrived together.
            if data := frames.join(together):
                yield data
        if frames.end:
            yield frames.end
    except Exception as error:  # noqa: BLE001
        # The client is told, and what nobody expected is logged.
        yield frames.failure(error)
    # After the end of the answer a server may report a disconnect.
    stop_watching()


def _stopping(scope: Scope) -> Stopping:
    return cast(Stopping, scope["app"].state.stopping)


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[Callable[[], object]]:
    """Cancels the block when the client leaves, and then exits quietly. Yields a function that ends
    the watch. The body must have been received. A timeout interrupts the block exactly once, so
    clean-up in it may wait.
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
    """A `receive` that never reports: `while_connected` watches the client."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError
