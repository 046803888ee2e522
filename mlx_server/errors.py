"""Exceptions shown to clients, which `api/http` puts into the protocol's shape."""

import re
from collections.abc import Iterable

NUMBER = re.compile(r"\[Errno -?\d+\] ")


def reason(error: BaseException) -> str:
    """What the system or a library says, without its number; its kind if it says nothing."""
    return NUMBER.sub("", str(error)) or type(error).__name__


class ServerError(Exception):
    """`status` is HTTP's; `type` and `code` are OpenAI's. `param` is the request field at fault;
    `retry_after` (seconds) becomes the header.
    """

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class BadRequest(ServerError):
    status = 400
    type = "invalid_request_error"
    code: str | None = None


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(ServerError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServerError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(ServerError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ServerError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(ServerError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class TooManyRequests(ServerError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ServerError):
    """A later request may succeed."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class ModelLoading(Unavailable):
    """The wait for the model ran out."""

    code = "model_loading"


class ModelLoadFailed(Unavailable):
    code = "model_load_failed"


class LoadCrashed(ModelLoadFailed):
    """The engine ended while loading; another try may succeed. `last_lines` are from its standard
    error.
    """

    def __init__(self, message: str, last_lines: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.last_lines = tuple(last_lines)


class InsufficientMemory(Unavailable):
    code = "insufficient_memory"


class RequestTimeout(ServerError):
    status = 504
    code = "request_timeout"


class EngineFailed(ServerError):
    """On this request, or ended because of it."""

    code = "engine_failed"
