"""Layers that refuse a request before its body is read. Pure ASGI, so that streams stay streams."""

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_server.api.http.body_limit import discard_body, has_body
from mlx_server.api.http.connection import CROWDED
from mlx_server.api.http.failures import ConnectionsFull, error_response
from mlx_server.api.http.stopping import ServerStopping, Stopping
from mlx_server.errors import BadRequest, Forbidden, ServerError

DISCARD_BYTES = 1 << 20
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
ALWAYS_ANSWERED = frozenset({"/health", "/metrics"})
LOCAL_NAME = re.compile(r"[\w-]+|([\w-]+\.)+(localhost|local|internal|home\.arpa)", re.ASCII)
"""Names that public DNS gives nobody: one word, or below a domain kept for local use."""


class AvailabilityCheck:
    """Refuses requests, except monitoring, while stopping or over the connection limit."""

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self.app = app
        self.stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
            return
        if has_body(scope):
            await discard_body(receive, DISCARD_BYTES)
        await error_response(error, scope, {"Connection": "close"})(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServerError | None:
        if scope["path"] in ALWAYS_ANSWERED:
            return None
        if self.stopping.begun:
            return ServerStopping()
        return ConnectionsFull() if scope["state"].get(CROWDED) else None


class HostCheck:
    """Refuses foreign host names: stops DNS rebinding by web pages. That takes a name which public
    DNS knows, and a server that answers whoever reaches it: a page knows no key. Loopback is
    checked all the same.
    """

    def __init__(
        self, app: ASGIApp, host: str, allowed_hosts: Iterable[str], *, asks_for_key: bool
    ) -> None:
        self.app = app
        names = (host, socket.gethostname(), *allowed_hosts)
        self.allowed = {_bare_host(name) for name in names if name}
        self.any_name = "*" in self.allowed or (asks_for_key and not _is_loopback(host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_ours(scope):
            await self.app(scope, receive, send)
            return
        error = BadRequest(
            "The Host header does not name this server. Add the name to `allowed_hosts`.",
            code="invalid_host",
        )
        await error_response(error, scope)(scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        hosts = Headers(scope=scope).getlist("host")
        if self.any_name or (not hosts and scope["http_version"] == "1.0"):
            return True
        if len(hosts) != 1:
            return False
        host = _bare_host(hosts[0])
        return host in self.allowed or bool(LOCAL_NAME.fullmatch(host)) or _is_address(host)


class OriginCheck:
    """Refuses changes asked for by a page of another origin (CSRF): browsers send simple requests
    without asking, and CORS only hides the answers.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self.app = app
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if all(self._is_ours(origin, headers) for origin in headers.getlist("origin")):
            await self.app(scope, receive, send)
            return
        error = Forbidden(
            "A page of another origin may not do this. Add its origin to `cors_origins`.",
            code="invalid_origin",
        )
        await error_response(error, scope)(scope, receive, send)

    def _is_ours(self, origin: str, headers: Headers) -> bool:
        origin = origin.lower()
        if "*" in self.origins or origin in self.origins:
            return True
        # Same origin, also behind an HTTPS proxy. HostCheck has approved the host.
        host = headers.get("host", "").lower()
        return bool(host) and origin in (f"http://{host}", f"https://{host}")


class HeadAsGet:
    """Answers HEAD as GET; the server that runs the application leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        # Not in place: the server goes by its own scope.
        asked = {**scope, "method": "GET"}
        try:
            await self.app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    host = _bare_host(host)
    if _is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _bare_host(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.rstrip(".")
