"""The exceptions that clients are told about, raised where the fact is known.

`api/http` turns them into the protocol's shape.
"""

from collections.abc import Iterable


class ServerError(Exception):
    """`status` is HTTP's, `type` and `code` are OpenAI's words for it.

    `param` names the request's field at fault; `retry_after`, in seconds, becomes the header.
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
    """No API key, or not one of ours."""

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
    """A queue is full or a rate is exceeded."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ServerError):
    """The server may be able to do this soon."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class ModelLoading(Unavailable):
    """The wait for the model has run out."""

    code = "model_loading"


class ModelLoadFailed(Unavailable):
    code = "model_load_failed"


class LoadCrashed(ModelLoadFailed):
    """The engine ended while it loaded the model, which may not happen again.

    `last_lines` are the last that it wrote to standard error.
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
    """The engine failed on this request, or ended because of it."""

    code = "engine_failed"
