"""OpenAI's envelope: errors, server-sent events and rate limit headers."""

from functools import partial
from math import ceil

from mlx_server.api.http import openapi
from mlx_server.api.http.limits import Window
from mlx_server.api.http.wire import Failure, HeaderPairs, StreamEvent, Wire, server_sent
from mlx_server.schemas.openai.common import ErrorBody, ErrorDetails

END_MARK = "[DONE]"

documented = partial(openapi.documented, ErrorBody)


def error_body(failure: Failure) -> bytes:
    details = ErrorDetails(
        message=failure.message, type=failure.type, param=failure.param, code=failure.code
    )
    return ErrorBody(error=details).to_json()


def error_event(failure: Failure) -> StreamEvent:
    return StreamEvent(error_body(failure))


def rate_headers(kind: str, window: Window) -> HeaderPairs:
    """https://platform.openai.com/docs/guides/rate-limits"""
    figures = {
        "limit": str(window.limit),
        "remaining": str(window.remaining),
        "reset": f"{ceil(window.seconds_to_reset)}s",
    }
    return [(f"x-ratelimit-{name}-{kind}".encode(), v.encode()) for name, v in figures.items()]


WIRE = Wire(
    name="openai",
    error_model=ErrorBody,
    error_body=error_body,
    error_event=error_event,
    frame=server_sent,
    ping=b": ping\n\n",
    end=server_sent(StreamEvent(END_MARK.encode()), 0),
    rate_headers=rate_headers,
    exposed_headers=tuple(
        f"x-ratelimit-{name}-{kind}"
        for kind in ("requests", "tokens")
        for name in ("limit", "remaining", "reset")
    ),
)
