"""What happens to every request before a route sees it. Pure ASGI, so that streams stay streams."""

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from typing import Any

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_server.api.http.connection import CROWDED
from mlx_server.api.http.failures import ConnectionsFull, ReceiveTimeout, error_response, unexpected
from mlx_server.api.http.stopping import ServerStopping, Stopping
from mlx_server.config import Settings
from mlx_server.errors import BadRequest, BodyTooLarge, Forbidden, ServerError
from mlx_server.events import event
from mlx_server.telemetry import UNTRACED_PATHS, Metrics

logger = logging.getLogger(__name__)

ANSWER_HEADERS = "answer_headers"
"""The key of a request's state with headers for its answer, as pairs of bytes."""
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DISCARD_FACTOR = 8
DISCARD_BYTES = 1 << 20
DISCARD_SECONDS = 10.0
SLOWEST_BODY = 1024
"""Bytes per second that a body must reach at least, once the patience for it is over."""
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
ALWAYS_ANSWERED = frozenset({"/health", "/metrics"})

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Pages that `cors_origins` names ask with CORS, which this one does not restrict.
    (b"cross-origin-resource-policy", b"same-origin"),
]
PAGE_HEADERS = [
    (b"content-security-policy", b"frame-ancestors 'none'; base-uri 'none'; object-src 'none'"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
"""For HTML, which the interactive documentation is."""


class RequestContext:
    """The outermost layer: gives a request its id, counts and logs it, answers bugs with a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, request_id, scope["state"])
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            told = unexpected(error, request_id)
            trace.get_current_span().record_exception(error)
            if status:
                # The answer has begun and cannot be completed: the server cuts the connection.
                raise
            await error_response(told)(scope, receive, send_with_id)
        finally:
            self.metrics.in_flight.dec()
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log a request; status 0 is a client that left before the answer began."""
        path = getattr(scope.get("route"), "path_format", "unmatched")
        self.metrics.requests.labels(scope["method"][:16], path, str(status)).inc()
        quiet = scope["path"] in UNTRACED_PATHS
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            event(
                "request",
                request_id=scope["state"]["request_id"],
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                seconds=round(seconds, 4),
                key=scope["state"].get("key"),
            ),
        )


def _add_headers(message: Message, request_id: str, state: dict[str, Any]) -> None:
    """Add what every answer says, and what others left in the request's `state` to be said."""
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    headers.raw.extend(SECURITY_HEADERS)
    if headers.get("content-type", "").startswith("text/html"):
        headers.raw.extend(PAGE_HEADERS)
    headers.raw.extend(state.get(ANSWER_HEADERS, ()))


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if SANE_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


class Doorkeeper:
    """Refuses requests while the server stops, or has too many connections.

    Those who watch over the server are answered all the same.
    """

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self.app = app
        self.stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ALWAYS_ANSWERED:
            error: ServerError | None = None
            if self.stopping.begun:
                error = ServerStopping()
            elif scope["state"].get(CROWDED):
                error = ConnectionsFull()
            if error is not None:
                if _has_body(Headers(scope=scope)):
                    # Cut off before it has sent everything, a client might not see the answer.
                    await _discard(receive, DISCARD_BYTES)
                await error_response(error, {"Connection": "close"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class HostCheck:
    """Refuses names that are not this server's: a web page cannot rebind its name to us."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.allowed = {_bare_host(host) for host in (settings.host, *settings.allowed_hosts)}
        # Rebinding needs a name: on a wildcard address any literal address is one of ours.
        self.any_address = settings.host in ("0.0.0.0", "::", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_ours(Headers(scope=scope).getlist("host")):
            error = BadRequest(
                "The Host header does not name this server. Add the name to `allowed_hosts`.",
                code="invalid_host",
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_ours(self, hosts: list[str]) -> bool:
        if "*" in self.allowed:
            return True
        if len(hosts) != 1:
            return False
        host = _bare_host(hosts[0])
        if host in self.allowed or host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or self.any_address


class OriginCheck:
    """Refuses what a page of another origin wants to change.

    A browser sends simple requests before it asks anyone; CORS only keeps their answers from the
    page. It names the page's origin, which clients that are no browsers do not send.
    """

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        self.app = app
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers = Headers(scope=scope)
            foreign = [o for o in headers.getlist("origin") if not self._is_ours(o, headers)]
            if foreign:
                error = Forbidden(
                    "A page of another origin may not do this. Add its origin to `cors_origins`.",
                    code="invalid_origin",
                )
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_ours(self, origin: str, headers: Headers) -> bool:
        origin = origin.lower()
        if "*" in self.origins or origin in self.origins:
            return True
        # The same origin, if a proxy speaks HTTPS for us too. HostCheck has approved of the host.
        host = headers.get("host", "").lower()
        return bool(host) and origin in (f"http://{host}", f"https://{host}")


def _bare_host(host: str) -> str:
    """The host without port, brackets, or a root dot: `[::1]:8000` is `::1`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.rstrip(".")


class BodyLimit:
    """Reads the body, up to a limit, before anything else looks at the request.

    Every route needs its body whole, so holding it here costs nothing, and a refusal can be sent
    before any other answer has begun.
    """

    def __init__(self, app: ASGIApp, limit: int, patience: float) -> None:
        self.app = app
        self.limit = limit
        self.patience = patience
        """Seconds without progress, and before the body's pace counts."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if not _has_body(headers):
            await self.app(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        declared = int(length) if length.isascii() and length.isdigit() else 0
        if declared > self.limit:
            # A client that waits for leave to send has sent nothing that must be read away.
            waits = headers.get("expect", "").lower() == "100-continue"
            clean = not waits and await _discard(receive, self.limit * DISCARD_FACTOR)
            await self._refuse(scope, receive, send, clean)
            return
        try:
            body, complete = await self._read(receive)
        except TimeoutError:
            late = ReceiveTimeout(self.patience)
            await error_response(late, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        if len(body) > self.limit:
            clean = complete or await _discard(receive, self.limit * DISCARD_FACTOR)
            await self._refuse(scope, receive, send, clean)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> tuple[bytes | None, bool]:
        """The body, or the first part of one that is too large, and whether that was all.

        None if the client went away. Raises TimeoutError when it stalls, or trickles.
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
        # What was left unread would be taken for the next request.
        headers = {} if clean else {"Connection": "close"}
        await error_response(error, headers)(scope, receive, send)


def _has_body(headers: Headers) -> bool:
    return "content-length" in headers or "transfer-encoding" in headers


async def _discard(receive: Receive, left: int) -> bool:
    """Read up to `left` bytes of a body away: many clients read no answer before they have sent
    everything, and would see a broken connection instead. Returns whether that was all of it."""
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return True
                left -= len(message.get("body", b""))
    except TimeoutError:
        return False
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
