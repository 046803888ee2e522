"""Limits on a request body's size and duration."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_server.api.http.failures import ReceiveTimeout, error_response
from mlx_server.errors import BodyTooLarge

DISCARD_FACTOR = 8
DISCARD_SECONDS = 10.0
SLOWEST_BODY = 1024
"""Bytes per second that a body must average once `patience` has passed."""


class BodyLimit:
    """Reads the body, up to a limit, before routing: every route needs it whole."""

    def __init__(self, app: ASGIApp, limit: int, patience: float) -> None:
        self.app = app
        self.limit = limit
        self.patience = patience
        """Seconds a body may pause, and after which its average pace counts."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        declared = int(length) if length.isascii() and length.isdigit() else 0
        if declared > self.limit:
            # The client has not sent the body yet: nothing to discard.
            waits = headers.get("expect", "").lower() == "100-continue"
            clean = not waits and await discard_body(receive, self.limit * DISCARD_FACTOR)
            await self._refuse(scope, receive, send, clean)
            return
        try:
            body, complete = await self._read(receive)
        except TimeoutError:
            late = ReceiveTimeout(self.patience)
            await error_response(late, scope, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        if len(body) > self.limit:
            clean = complete or await discard_body(receive, self.limit * DISCARD_FACTOR)
            await self._refuse(scope, receive, send, clean)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> tuple[bytes | None, bool]:
        """The body (or the start of one that is too large) and whether that was all; None if the
        client left. Raises TimeoutError when it stalls or trickles.
        """
        chunks: list[bytes] = []
        size = 0
        more = True
        clock = asyncio.get_running_loop().time
        started = clock()
        while more and size <= self.limit:
            latest = started + self.patience + size / SLOWEST_BODY
            async with asyncio.timeout_at(min(latest, clock() + self.patience)):
                message = await receive()
            if message["type"] == "http.disconnect":
                return None, True
            chunk = message.get("body", b"")
            chunks.append(chunk)
            size += len(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks), not more

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, clean: bool) -> None:
        error = BodyTooLarge(f"The request body is larger than {self.limit} bytes.")
        # Unread bytes would be taken for the next request.
        headers = {} if clean else {"Connection": "close"}
        await error_response(error, scope, headers)(scope, receive, send)


def has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "content-length" in headers or "transfer-encoding" in headers


async def discard_body(receive: Receive, limit: int) -> bool:
    """Read away up to `limit` bytes; returns whether that was all. Many clients read no answer
    before they have sent everything.
    """
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while limit > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return True
                limit -= len(message.get("body", b""))
    except TimeoutError:
        return False
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
