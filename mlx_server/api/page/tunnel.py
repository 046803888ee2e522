"""WebSockets of the page: bytes pass between the browser and the page's process, unread."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

from starlette.requests import Request

from mlx_server.api.http.connection import LINGER_SECONDS, TAKE_OVER


class Side(asyncio.Protocol):
    """One end of a tunnel."""

    def __init__(self) -> None:
        self.other: Side | None = None
        self.transport: asyncio.Transport | None = None
        self.on_lost: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.on_lost is not None:
            self.on_lost()
        if self.other is not None:
            self.other.close()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def close(self) -> None:
        """Whoever reads nothing of what is left is cut off."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self.transport.abort)

    def shutdown(self) -> None:
        """The server's way to close a connection."""
        self.close()


async def tunnel(request: Request, path: Path) -> None:
    """Hand the connection of `request` to what listens at `path`, which answers the request, too.
    Raises OSError, and KeyError under a server whose connections cannot be handed over.
    """
    take_over = request.scope["state"][TAKE_OVER]
    loop = asyncio.get_running_loop()
    transport, page = await loop.create_unix_connection(Side, str(path))
    browser = Side()
    browser.other, page.other = page, browser
    browser.transport = take_over(browser)
    transport.write(_head(request))


def target(request: Request) -> bytes:
    """Path and query, as they were asked for."""
    path: bytes = request.scope["raw_path"]
    query: bytes = request.scope["query_string"]
    return path + b"?" + query if query else path


def _head(request: Request) -> bytes:
    headers = b"".join(b"%b: %b\r\n" % pair for pair in request.headers.raw)
    return b"GET %b HTTP/1.1\r\n%b\r\n" % (target(request), headers)
