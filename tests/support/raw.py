"""A client without manners: a bare connection on which anything, or nothing, can be said."""

import json
import socket
from typing import Any, Self

from tests.support.server import CHAT, Server


class Raw:
    """A connection to `server`. `receive_buffer` is the room for what it has not read, in bytes."""

    def __init__(self, server: Server, *, receive_buffer: int | None = None) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.host = f"{host}:{port}"
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(10)
        self.socket.connect((host, int(port)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def head(self, *lines: str) -> bytes:
        """The beginning of a chat request, without the empty line that ends its headers."""
        return "\r\n".join([f"POST {CHAT} HTTP/1.1", f"Host: {self.host}", *lines, ""]).encode()

    def send_chat(self, body: dict[str, Any]) -> None:
        """Send a whole chat request."""
        content = json.dumps(body).encode()
        self.socket.sendall(self.head(f"Content-Length: {len(content)}", "") + content)

    def answer(self) -> tuple[int, bytes]:
        """The status, 0 if there is none, and the body of what comes before the end."""
        head, body = self.whole()
        return int(head.split(" ", 2)[1]) if head else 0, body.encode()

    def whole(self) -> tuple[str, str]:
        """The head in lower case, and the body, of what comes before the end."""
        received = b""
        while data := self.socket.recv(65536):
            received += data
        head, _, body = received.decode().partition("\r\n\r\n")
        return head.lower(), body
