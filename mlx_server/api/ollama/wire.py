"""Ollama's envelope: errors, and streams as lines of JSON."""

from functools import partial

from mlx_server.api.http import openapi
from mlx_server.api.http.wire import Failure, StreamEvent, Wire, json_line
from mlx_server.schemas.ollama.common import OllamaError

documented = partial(openapi.documented, OllamaError)


def error_body(failure: Failure) -> bytes:
    return OllamaError(error=failure.message).to_json()


def error_event(failure: Failure) -> StreamEvent:
    return StreamEvent(error_body(failure))


WIRE = Wire(
    name="ollama",
    error_model=OllamaError,
    error_body=error_body,
    error_event=error_event,
    frame=json_line,
    ping=b"",
    media_type="application/x-ndjson",
)
