"""Turns exceptions into answers."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from opentelemetry import trace
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from mlx_server.api.http.validation import brief, invalid_request
from mlx_server.api.http.wire import Failure, Wire, wire_of
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
from mlx_server.telemetry.record import RequestRecord

logger = logging.getLogger(__name__)

MAX_MESSAGE = 500


class ReceiveTimeout(ServerError):
    status = 408
    type = "invalid_request_error"
    code = "receive_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request did not arrive as fast as needed within {seconds:g} s.")


class HeadTooLarge(ServerError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request's headers are larger than {limit} bytes.")


class ConnectionsFull(Unavailable):
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


def install(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return error_response(error, request.scope)

    for kind in (ServerError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def error_response(
    error: Exception, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    return refusal(wire_of(scope), failure_of(error, scope), headers)


def refusal(wire: Wire, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        wire.error_body(failure),
        failure.status,
        {**failure.headers, **(headers or {})},
        media_type="application/json",
    )


def failure_of(error: Exception, scope: Scope) -> Failure:
    """Notes the error on the request's record and logs unexpected ones."""
    failure = _failure(error, scope)
    record: RequestRecord = scope["state"]["record"]
    record.error = failure.code or failure.type
    trace.get_current_span().set_attribute("mlx_server.error", record.error)
    return failure


def _failure(error: Exception, scope: Scope) -> Failure:
    request_id = scope["state"]["request_id"]
    match error:
        case ServerError():
            return described(error, request_id)
        case RequestValidationError():
            return described(invalid_request(error.errors(), error.body), request_id)
        case HTTPException():
            return _http_failure(error, scope)
    logger.error(
        event("unexpected_error", request_id=request_id, error=type(error).__qualname__),
        exc_info=error,
    )
    message = f"Internal error. Quote this id when you report it: {request_id}"
    return described(ServerError(message), request_id)


def described(error: ServerError, request_id: str = "") -> Failure:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Failure(
        status=error.status,
        type=error.type,
        code=error.code,
        message=brief(error.message, MAX_MESSAGE),
        param=error.param,
        request_id=request_id,
        headers=headers,
    )


def _http_failure(error: HTTPException, scope: Scope) -> Failure:
    kind = KINDS.get(error.status_code, BadRequest if error.status_code < 500 else ServerError)
    path = brief(scope["path"], MAX_MESSAGE)
    match error.status_code:
        case 404:
            message = f"There is nothing at {path}."
        case 405:
            message = f"{scope['method']} is not a method of {path}."
        case _:
            message = str(error.detail)
    failure = described(kind(message), scope["state"]["request_id"])
    headers = {**failure.headers, **(error.headers or {})}
    return replace(failure, status=error.status_code, headers=headers)
