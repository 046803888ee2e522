"""Anthropic's envelope: errors, server-sent events and rate limit headers."""

from datetime import UTC, datetime, timedelta
from functools import partial

from mlx_server.api.http import openapi
from mlx_server.api.http.limits import Window
from mlx_server.api.http.wire import Failure, HeaderPairs, StreamEvent, Wire, server_sent
from mlx_server.schemas.anthropic.responses import ErrorCause, ErrorObject, MessagesError, Ping

LONGEST_SILENCE = 5.0
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""By status: https://platform.claude.com/docs/en/api/errors"""

documented = partial(openapi.documented, MessagesError)


def error_body(failure: Failure) -> bytes:
    bad = "invalid_request_error" if failure.status < 500 else "api_error"
    error = ErrorObject(type=TYPES.get(failure.status, bad), message=failure.message)
    if failure.code is not None:
        error.details = ErrorCause(error_code=failure.code)
    return MessagesError(type="error", error=error, request_id=failure.request_id).to_json()


def error_event(failure: Failure) -> StreamEvent:
    return StreamEvent(error_body(failure), "error")


PING = StreamEvent(Ping(type="ping").to_json(), "ping")


def headers(request_id: str) -> HeaderPairs:
    return [(b"request-id", request_id.encode())]


def rate_headers(kind: str, window: Window) -> HeaderPairs:
    """https://platform.claude.com/docs/en/api/rate-limits"""
    reset = datetime.now(UTC) + timedelta(seconds=window.seconds_to_reset)
    figures = {
        "limit": str(window.limit),
        "remaining": str(window.remaining),
        "reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return [(_rate_header(kind, name).encode(), v.encode()) for name, v in figures.items()]


def _rate_header(kind: str, name: str) -> str:
    return f"anthropic-ratelimit-{kind}-{name}"


WIRE = Wire(
    name="anthropic",
    error_model=MessagesError,
    error_body=error_body,
    error_event=error_event,
    frame=server_sent,
    ping=server_sent(PING, 0),
    longest_silence=LONGEST_SILENCE,
    headers=headers,
    rate_headers=rate_headers,
    exposed_headers=(
        "request-id",
        *(
            _rate_header(kind, name)
            for kind in ("requests", "tokens")
            for name in ("limit", "remaining", "reset")
        ),
    ),
)
