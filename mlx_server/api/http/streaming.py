"""Answers that take their time: a stream of events, or one body after a long wait.

Both hold their generation inside their own call, so that every ending closes it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_server.api.http.failures import failure_of
from mlx_server.api.http.stopping import ServerStopping, Stopping
from mlx_server.api.http.wire import StreamEvent, wire_of
from mlx_server.config import Settings

STREAM_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"connection", b"keep-alive"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


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
    """Streams the events that `opened` yields, in batches.

    An error while opening is an ordinary answer with its status; a later one is the last event. A
    stopping server ends the stream with an error after `grace` seconds, or its default.
    """

    def __init__(
        self,
        opened: AbstractAsyncContextManager[AsyncIterator[Iterable[StreamEvent]]],
        grace: float | None = None,
    ) -> None:
        super().__init__()
        self._opened = opened
        self._grace = grace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _Stream(scope, send)
        async with while_connected(receive) as stop_watching:
            try:
                async with _stopping(scope).limited(self._grace):
                    await self._write_all(stream, stop_watching)
            except ServerStopping as error:
                if not stream.begun:
                    raise
                if not stream.ended:
                    stop_watching()
                    await stream.fail(error)

    async def _write_all(self, stream: "_Stream", stop_watching: Callable[[], object]) -> None:
        async with self._opened as events:
            await stream.begin()
            error: Exception | None = None
            async with stream.pinged():
                try:
                    async for together in events:
                        await stream.write(together)
                except Exception as raised:  # noqa: BLE001
                    # The client is told, and what nobody expected is logged.
                    error = raised
            # A server may report the end of the answer as a disconnect.
            stop_watching()
            if error is None:
                await stream.end()
            else:
                await stream.fail(error)


class _Stream:
    """A streamed answer under way."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.begun = False
        self.ended = False
        self._scope = scope
        self._send = send
        self._wire = wire_of(scope)
        self._ping_interval = cast(Settings, scope["app"].state.settings).ping_interval
        self._events = 0

    async def begin(self) -> None:
        self.begun = True
        headers = [(b"content-type", self._wire.media_type.encode()), *STREAM_HEADERS]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, events: Iterable[StreamEvent]) -> None:
        # Sending costs by the piece.
        if data := b"".join([self._framed(event) for event in events]):
            await self._send_body(data)

    async def end(self) -> None:
        await self._finish(self._wire.end)

    async def fail(self, error: Exception) -> None:
        """End with an event that tells the client about `error`."""
        event = self._wire.error_event(failure_of(error, self._scope))
        await self._finish(self._framed(event))

    @asynccontextmanager
    async def pinged(self) -> AsyncIterator[None]:
        pings = asyncio.create_task(self._ping())
        try:
            yield
        finally:
            pings.cancel()
            await asyncio.wait([pings])

    async def _ping(self) -> None:
        while self._wire.ping:
            await asyncio.sleep(self._ping_interval)
            await self._send_body(self._wire.ping)

    def _framed(self, event: StreamEvent) -> bytes:
        number = self._events
        self._events += 1
        return self._wire.frame(event, number)

    async def _finish(self, data: bytes) -> None:
        self.ended = True
        await self._send_body(data, more=False)

    async def _send_body(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _stopping(scope: Scope) -> Stopping:
    return cast(Stopping, scope["app"].state.stopping)


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[Callable[[], object]]:
    """Cancels the block when the client goes away, and then leaves it quietly.

    Yields a function that ends the watch. The body must have been received. A timeout interrupts
    the block exactly once, so clean-up in it may wait.
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
