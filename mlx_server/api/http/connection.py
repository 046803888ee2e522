"""uvicorn's HTTP protocol with bounds on what a client may cost. Nothing runs per token."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from mlx_server.api.http.failures import (
    ConnectionsFull,
    HeadTooLarge,
    ReceiveTimeout,
    described,
    refusal,
)
from mlx_server.api.http.wire import Wires
from mlx_server.config import Settings
from mlx_server.errors import BadRequest, ServerError

SPARE_CONNECTIONS = 64
"""Connections beyond the limit that still get health and metrics."""
LINGER_SECONDS = 1.0
"""Seconds: a refused client that is cut off at once may miss its answer."""
CROWDED = "crowded"
"""Key in the request's state: over the connection limit."""
TAKE_OVER = "take_over"
"""Key in the state of a request to upgrade: hands its connection to another protocol."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Counts, bytes, and timeouts in seconds."""

    connections: int
    head_bytes: int
    receive_timeout: float
    send_timeout: float

    @classmethod
    def of(cls, settings: Settings) -> "ConnectionLimits":
        return cls(
            connections=settings.max_connections,
            head_bytes=settings.max_header_bytes,
            receive_timeout=settings.receive_timeout,
            send_timeout=settings.send_timeout,
        )


class Timer:
    def __init__(self, seconds: float, callback: Callable[[], None]) -> None:
        self._seconds = seconds
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._handle is not None

    def start(self) -> None:
        if self._handle is None:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(self._seconds, self._expire)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _expire(self) -> None:
        self._handle = None
        self._callback()


class StallWatch:
    """Cuts off a client that reads nothing for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._timer = Timer(seconds, self._check)
        self._transport: asyncio.Transport | None = None
        self._size = 0

    def start(self, transport: asyncio.Transport) -> None:
        if not self._timer.running:
            self._transport = transport
            self._size = transport.get_write_buffer_size()
            self._timer.start()

    def stop(self) -> None:
        self._timer.stop()

    def _check(self) -> None:
        assert self._transport is not None
        if self._transport.get_write_buffer_size() < self._size:
            self.start(self._transport)
        else:
            self._transport.abort()


class Connection(HttpToolsProtocol):
    """Bounds what one connection may cost.

    * A request head has `receive_timeout` seconds from its first byte, however steadily it comes.
    * A client that reads nothing for `send_timeout` seconds is cut off.
    * Beyond the limit `AvailabilityCheck` refuses requests; far beyond, connections are refused.
    """

    def __init__(
        self, *arguments: Any, limits: ConnectionLimits, wires: Wires, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.url = b""
        self._limits = limits
        self._wires = wires
        self._in_head = True
        self._head_bytes = 0
        self._heads = 0
        self._messages = 0
        self._fault: ServerError | None = None
        self._refused = False
        self._head_timer = Timer(limits.receive_timeout, self._head_is_late)
        self._stall_watch = StallWatch(limits.send_timeout)

    # opening and closing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer.start()
        if len(self.connections) > self._limits.connections + SPARE_CONNECTIONS:
            self._refuse(ConnectionsFull())

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.stop()
        self._stall_watch.stop()
        super().connection_lost(exc)

    def _refuse(self, error: ServerError) -> None:
        self._refused = True
        if self._answering:
            self.transport.close()
            return
        if not self.transport.is_closing():
            wire = self._wires.of(self.url.partition(b"?")[0].decode("latin-1"))
            response = refusal(wire, described(error), {"connection": "close"})
            head = b"".join(b"%b: %b\r\n" % pair for pair in response.raw_headers)
            self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + bytes(response.body))
            self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # receiving

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        messages = self._messages
        super().data_received(data)
        if self._refused:
            return
        if self._in_head and messages == self._messages:
            self._head_bytes += len(data)
            self._head_timer.start()
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(HeadTooLarge(self._limits.head_bytes))
        elif not (self._in_head or self._answering):
            # The rest of a body that was answered early.
            self._head_timer.start()

    def on_message_begin(self) -> None:
        self._head_timer.start()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._heads += 1
        self._head_bytes = 0
        self._head_timer.stop()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._limits.head_bytes:
            self._fault = HeadTooLarge(self._limits.head_bytes)
            raise ValueError("head too large")  # stops the parser via send_400_response
        crowded = len(self.connections) > self._limits.connections
        self.scope.setdefault("state", {})[CROWDED] = crowded
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            send = partial(_send_without_chunks, self.cycle, self.cycle.send)
            self.cycle.send = send  # type: ignore[method-assign]
        if self.parser.should_upgrade() and self._get_upgrade() == b"websocket":
            self.scope["state"][TAKE_OVER] = self._hand_over

    def on_message_complete(self) -> None:
        self._in_head = True
        self._messages += 1
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or BadRequest("This is not valid HTTP.", code="invalid_http"))

    def _head_is_late(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._answering:
            # Reading is paused, or this was a stray newline.
            self._head_timer.start()
        elif self._head_bytes:
            self._refuse(ReceiveTimeout(self._limits.receive_timeout))
        elif not (self._in_head and self._heads):
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Whether it is supported, the application says."""

    def _hand_over(self, successor: Any) -> asyncio.Transport:
        """From now on the connection is `successor`'s, which answers the request."""
        self._head_timer.stop()
        self._stall_watch.stop()
        self._unset_keepalive_if_required()
        # To uvicorn, whoever asked is gone.
        self.cycle.disconnected = True
        self.connections.discard(self)
        self.connections.add(successor)
        successor.on_lost = partial(self.connections.discard, successor)
        self.transport.set_protocol(successor)
        self.flow.resume_reading()
        return self.transport

    # sending

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_watch.start(self.transport)

    def resume_writing(self) -> None:
        self._stall_watch.stop()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._stall_watch.start(self.transport)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._stall_watch.start(self.transport)


async def _send_without_chunks(cycle: RequestResponseCycle, send: Any, message: Any) -> None:
    """HTTP/1.0 knows no chunks: a body without a length ends with the connection."""
    if message["type"] == "http.response.start":
        cycle.chunked_encoding = False
    else:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)
