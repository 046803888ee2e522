"""Parts of the API's description that FastAPI cannot infer: errors and streams."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]


def documented(error_model: type[BaseModel], *statuses: int) -> Responses:
    return {
        status: {"model": error_model, "description": HTTPStatus(status).phrase}
        for status in statuses
    }


def any_error(error_model: type[BaseModel]) -> Responses:
    """Suppresses the 422 that FastAPI documents and this server never sends."""
    return {"default": {"model": error_model, "description": "Error"}}


def event_stream(events: Sequence[type[BaseModel]], marks: Sequence[str] = ()) -> Responses:
    """`responses` of a server-sent event stream: JSON of one of `events`, or one of `marks`."""
    content = {"anyOf": [_inlined(model) for model in events]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [data, {"enum": list(marks)}] if marks else [data]}},
    }
    # OpenAPI 3.2, "Sequential Media Types".
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


def json_lines(events: Sequence[type[BaseModel]]) -> Responses:
    """`responses` of a stream of lines, each JSON of one of `events`."""
    item = {"anyOf": [_inlined(model) for model in events]}
    return {200: {"content": {"application/x-ndjson": {"itemSchema": item}}}}


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without references, which FastAPI resolves for response models only."""
    schema = model.model_json_schema(mode="serialization")
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolved(definitions[part["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in part.items()}

    inlined: dict[str, Any] = resolved(schema)
    return inlined
