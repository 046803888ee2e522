"""Layers that refuse a request before its body is read. Pure ASGI, so that streams stay streams."""

import ipaddress
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
    """Refuses foreign host names: stops DNS rebinding by web pages."""

    def __init__(self, app: ASGIApp, host: str, allowed_hosts: Iterable[str]) -> None:
        self.app = app
        self.allowed = {_bare_host(name) for name in (host, *allowed_hosts)}
        # Rebinding needs a name, so a wildcard address accepts any literal address.
        self.any_address = host in ("0.0.0.0", "::", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_ours(Headers(scope=scope).getlist("host")):
            await self.app(scope, receive, send)
            return
        error = BadRequest(
            "The Host header does not name this server. Add the name to `allowed_hosts`.",
            code="invalid_host",
        )
        await error_response(error, scope)(scope, receive, send)

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


def _bare_host(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.rstrip(".")
