"""The envelope of rerankers."""

from functools import partial

from mlx_server.api.http import openapi
from mlx_server.api.http.wire import Failure, StreamEvent, Wire, json_line
from mlx_server.schemas.rerank.ranks import RerankError

documented = partial(openapi.documented, RerankError)


def error_body(failure: Failure) -> bytes:
    return RerankError(message=failure.message, detail=failure.message).to_json()


WIRE = Wire(
    name="rerank",
    error_model=RerankError,
    error_body=error_body,
    error_event=lambda failure: StreamEvent(error_body(failure)),
    frame=json_line,
    ping=b"",
)
