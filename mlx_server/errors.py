"""One family of exceptions. Each knows its HTTP status, its type and its code.

Raised where the fact is known; `api` turns them into the protocol's shape in one place.
"""

from collections.abc import Iterable


class ServerError(Exception):
    """Base of every error this server tells a client about.

    `status` is the HTTP status, `type` and `code` are OpenAI's words for it, `param` names the
    request field at fault, `retry_after` is in seconds and becomes the `Retry-After` header.
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
    """The request cannot be honoured as it stands."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


class ContextLengthExceeded(BadRequest):
    """Prompt and completion do not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(ServerError):
    """No API key, or not one of ours."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServerError):
    """The caller is known, and may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(ServerError):
    """No such path or object."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of that name can be served."""

    code = "model_not_found"


class MethodNotAllowed(ServerError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(ServerError):
    """The request body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class TooManyRequests(ServerError):
    """A queue is full or a rate is exceeded."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ServerError):
    """The server cannot do this now and may be able to soon."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class ModelLoading(Unavailable):
    """The model is still loading and the wait for it has run out."""

    code = "model_loading"


class ModelLoadFailed(Unavailable):
    """The model could not be loaded; the message says why."""

    code = "model_load_failed"


class LoadCrashed(ModelLoadFailed):
    """The engine ended while it loaded the model; it might not the next time.

    `last_lines` is the end of what it wrote to standard error.
    """

    def __init__(self, message: str, last_lines: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.last_lines = tuple(last_lines)


class InsufficientMemory(Unavailable):
    """The work does not fit the memory there is."""

    code = "insufficient_memory"


class RequestTimeout(ServerError):
    """The request took longer than any request may."""

    status = 504
    code = "request_timeout"


class EngineFailed(ServerError):
    """The engine could not compute this request, or ended because of it."""

    code = "engine_failed"
