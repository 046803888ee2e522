"""A client's connection: uvicorn's HTTP protocol with bounds on what a client may cost.

Nothing here runs per token: the bounds hang on what opens, begins and stalls.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mlx_server.api.http.failures import (
    ConnectionsFull,
    HeadTooLarge,
    ReceiveTimeout,
    error_response,
)
from mlx_server.config import Settings
from mlx_server.errors import BadRequest, ServerError

SPARE_CONNECTIONS = 64
"""Connections beyond the limit that are still heard, so that health and metrics answer."""
LINGER_SECONDS = 1.0
"""How long a refused client may go on sending. Cut off at once, it might not see its answer."""
CROWDED = "crowded"
"""The key of a request's state that says whether there are too many connections."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Numbers of connections and bytes, and seconds of patience."""

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


class Connection(HttpToolsProtocol):
    """One connection.

    * A request's head, its request line and headers, has `receive_timeout` seconds from its first
      byte, however steadily it comes, and `head_bytes` of room.
    * A client that takes nothing of what is sent to it for `send_timeout` seconds is cut off.
      Until then uvicorn pauses whoever writes to it.
    * Connections beyond the limit are marked, for `api.middleware` to refuse their requests;
      those far beyond it are refused as they open.
    """

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._in_head = True
        self._head_bytes = 0
        self._heads = 0
        self._messages = 0
        self._fault: ServerError | None = None
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    # opening and closing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self._limits.connections + SPARE_CONNECTIONS:
            self._refuse(ConnectionsFull())

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _refuse(self, error: ServerError) -> None:
        """Answer with `error` and close, listening a little while so that the answer arrives."""
        self._refused = True
        if self._answering:
            self.transport.close()
            return
        if not self.transport.is_closing():
            response = error_response(error, {"connection": "close"})
            head = b"".join(b"%b: %b\r\n" % pair for pair in response.raw_headers)
            self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + bytes(response.body))
            self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    @property
    def _answering(self) -> bool:
        """Whether a request is in work."""
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
            self._await_head()
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(HeadTooLarge(self._limits.head_bytes))
        elif not (self._in_head or self._answering):
            # The rest of a body that nobody wants: the answer came before it.
            self._await_head()

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._heads += 1
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._limits.head_bytes:
            self._fault = HeadTooLarge(self._limits.head_bytes)
            raise ValueError("head too large")  # which makes the parser stop, and comes back below
        self.scope.setdefault("state", {})[CROWDED] = (
            len(self.connections) > self._limits.connections
        )
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._messages += 1
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or BadRequest("This is not valid HTTP.", code="invalid_http"))

    def _await_head(self) -> None:
        if self._head_timer is None:
            patience = self._limits.receive_timeout
            self._head_timer = self.loop.call_later(patience, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._refused or self.transport.is_closing():
            return
        if self._answering:
            # Reading may be paused meanwhile, and what came may be no more than a stray newline.
            self._await_head()
        elif self._head_bytes:
            self._refuse(ReceiveTimeout(self._limits.receive_timeout))
        elif not (self._in_head and self._heads):
            self.transport.close()

    # sending

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_buffer()

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_buffer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_buffer()

    def _watch_buffer(self) -> None:
        """Cut the client off unless it takes something in time."""
        if self._send_timer is None:
            size = self.transport.get_write_buffer_size()
            patience = self._limits.send_timeout
            self._send_timer = self.loop.call_later(patience, self._check_buffer, size)

    def _check_buffer(self, before: int) -> None:
        self._send_timer = None
        if self.transport.get_write_buffer_size() < before:
            self._watch_buffer()
        else:
            self.transport.abort()
