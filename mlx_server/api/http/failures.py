"""The one place that builds error bodies, from whatever was raised.

Errors that only HTTP knows are defined here; all others in `mlx_server.errors`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mlx_server.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    ServerError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from mlx_server.events import event
from mlx_server.schemas.openai.common import ErrorBody, ErrorDetails

logger = logging.getLogger(__name__)

MAX_MESSAGE = 500


class ReceiveTimeout(ServerError):
    """The client did not send its request in time."""

    status = 408
    type = "invalid_request_error"
    code = "receive_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request did not arrive as fast as needed within {seconds:g} s.")


class HeadTooLarge(ServerError):
    """Request line and headers are over the limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request's headers are larger than {limit} bytes.")


class ConnectionsFull(Unavailable):
    """There are more connections than this server holds."""

    code = "too_many_connections"

    def __init__(self) -> None:
        super().__init__("This server has too many connections.", retry_after=1.0)


KINDS: dict[int, type[ServerError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        BodyTooLarge,
        TooManyRequests,
        Unavailable,
    )
}

ANY_ERROR: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Error"}
}


def install(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with these statuses."""
    descriptions = {status: HTTPStatus(status).phrase for status in statuses}
    return {
        status: {"model": ErrorBody, "description": text} for status, text in descriptions.items()
    }


def error_body(error: ServerError) -> bytes:
    """The body that tells a client about `error`."""
    details = ErrorDetails(
        message=_brief(error.message), type=error.type, param=error.param, code=error.code
    )
    return ErrorBody(error=details).to_json()


def error_response(error: ServerError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that tells a client about `error`."""
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        extra["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error), error.status, extra, media_type="application/json")


def unexpected(error: Exception, request_id: str) -> ServerError:
    """What a client is told about a bug of ours, which is logged in full."""
    logger.error(
        event("unexpected_error", request_id=request_id, error=type(error).__qualname__),
        exc_info=error,
    )
    return ServerError(f"Internal error. Quote this id when you report it: {request_id}")


def stream_error(error: Exception, request_id: str) -> ServerError:
    """What the client of a stream is told when `error` ends it."""
    return error if isinstance(error, ServerError) else unexpected(error, request_id)


async def _on_server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = KINDS.get(error.status_code, BadRequest if error.status_code < 500 else ServerError)
    told = kind(_http_message(request, error))
    response = error_response(told, error.headers)
    response.status_code = error.status_code
    return response


def _http_message(request: Request, error: HTTPException) -> str:
    path = request.url.path
    match error.status_code:
        case 404:
            return f"There is nothing at {_brief(path)}."
        case 405:
            return f"{request.method} is not a method of {_brief(path)}."
        case _:
            return str(error.detail)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error.errors(), error.body))


def invalid_request(problems: Sequence[Mapping[str, Any]], body: Any) -> BadRequest:
    """One readable error out of what Pydantic found wrong with `body`."""
    if problems[0]["type"] == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", "syntax error")
        return BadRequest(f"The body is not valid JSON: {reason}.", code="invalid_json")
    ranked = [(_rank(problem, body), problem) for problem in problems if _same(problem, problems)]
    best = max(rank for rank, _ in ranked)
    meant = [problem for rank, problem in ranked if rank == best]
    where = _field_path(meant[0], body)
    if not where:
        return BadRequest("The body must be a JSON object.")
    reason = " or ".join(list(dict.fromkeys(_reason(problem) for problem in meant))[:4])
    param = _brief(".".join(str(step) for step in where), 100)
    return BadRequest(f"Invalid `{param}`: {reason}.", param=param)


def _same(problem: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `problem` is about the field that the first one is about."""
    return bool(problem["loc"][:2] == problems[0]["loc"][:2])


def _rank(problem: Mapping[str, Any], body: Any) -> tuple[bool, int]:
    """How likely the problem is in the branch of a union that was meant.

    A union reports all its branches. One whose types fit was meant, and else the one that got
    deepest.
    """
    return not problem["type"].endswith("_type"), len(_field_path(problem, body))


def _reason(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return _brief(message[:1].lower() + message[1:], 300)


def _field_path(problem: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in `body` the problem is. Pydantic's own path also names the branches of unions."""
    path: list[str | int] = []
    here = body
    loc = problem["loc"]
    for step in loc[1:] if loc[:1] == ("body",) else loc:
        inside = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int) and step < len(here)
        )
        if inside:
            here = here[step]
        if inside or (problem["type"] == "missing" and step == loc[-1]):
            path.append(step)
    return path


def _brief(text: str, limit: int = MAX_MESSAGE) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
