"""The outermost layer around the application."""

import logging
import re
import secrets
import time

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_server.api.http.failures import error_response
from mlx_server.api.http.wire import Wires, wire_of
from mlx_server.events import PAGE_AGENT, event
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.record import RecentRequests, RequestRecord
from mlx_server.telemetry.tracing import untraced

logger = logging.getLogger(__name__)

ANSWER_HEADERS = "answer_headers"
"""Key in the request's state: answer headers as pairs of bytes."""
LONGEST_PATH = 200
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Does not affect CORS for pages in `cors_origins`.
    (b"cross-origin-resource-policy", b"same-origin"),
]
HTML_HEADERS = [
    (b"content-security-policy", b"frame-ancestors 'none'; base-uri 'none'; object-src 'none'"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class RequestContext:
    """Assigns the request id and `Wire`, counts and logs, answers bugs with a 500."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, recent: RecentRequests, wires: Wires
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.recent = recent
        self.wires = wires

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(scope)
        state["wire"] = wire = self.wires.of(scope["path"], scope["headers"])
        state["record"] = record = RequestRecord(state["request_id"], protocol=wire.name)
        started = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                _add_headers(message, scope)
            await send(message)

        self.metrics.in_flight.inc()
        self.recent.begin(record)
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            response = error_response(error, scope)
            trace.get_current_span().record_exception(error)
            if record.status:
                # The answer has begun: the server cuts the connection.
                raise
            await response(scope, receive, send_with_headers)
        finally:
            self.metrics.in_flight.dec()
            record.seconds = time.perf_counter() - started
            self._end(scope, record)

    def _end(self, scope: Scope, record: RequestRecord) -> None:
        route = getattr(scope.get("route"), "path_format", None)
        method = scope["method"][:16]
        self.metrics.requests.labels(method, route or "unmatched", str(record.status)).inc()
        record.path = route or scope["path"][:LONGEST_PATH]
        refused = record.error is not None and method == "POST" and record.protocol != "admin"
        self.recent.end(record, kept=refused and route is not None)
        quiet = untraced(scope) or (record.status == 200 and _is_a_look(scope))
        logger.log(
            logging.DEBUG if quiet else logging.WARNING if record.status >= 500 else logging.INFO,
            event(
                "request",
                request_id=record.id,
                method=method,
                path=scope["path"][:LONGEST_PATH],
                status=record.status,
                seconds=record.seconds,
                key=scope["state"].get("key"),
                **_inference(record),
                error=record.error,
            ),
        )


def _inference(record: RequestRecord) -> dict[str, object]:
    """Fields of a request that asked a model."""
    if record.operation is None:
        return {}
    return {
        "model": record.model,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish": ",".join(record.finish),
        "load": record.load_seconds,
        "render": record.render_seconds,
        "queue": record.queue_seconds,
        "prefill": record.prefill_seconds,
        "decode": record.decode_seconds,
        "ttft": record.first_token_seconds,
        "engine_ends": record.engine_ends or None,
    }


def _is_a_look(scope: Scope) -> bool:
    """An open page looks every few seconds."""
    agent = Headers(scope=scope).get("user-agent")
    return agent == PAGE_AGENT and scope["method"] == "GET"


def _add_headers(message: Message, scope: Scope) -> None:
    request_id = scope["state"]["request_id"]
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    headers.raw.extend(SECURITY_HEADERS)
    if headers.get("content-type", "").startswith("text/html"):
        headers.raw.extend(HTML_HEADERS)
    headers.raw.extend(wire_of(scope).headers(request_id))
    headers.raw.extend(scope["state"].get(ANSWER_HEADERS, ()))


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if SANE_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
