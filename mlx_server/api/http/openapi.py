"""What the description of the API says of streams, which FastAPI cannot see in our routes."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


def event_stream(
    events: Sequence[type[BaseModel]], marks: Sequence[str] = ()
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with server-sent events.

    The data of an event is JSON of one of the models `events`, or literally one of `marks`.
    """
    content = {"anyOf": [_inlined(model) for model in events]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [data, {"enum": list(marks)}] if marks else [data]}},
    }
    # An item is an event here: OpenAPI 3.2, "Sequential Media Types".
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model that does not contain itself, without references.

    FastAPI collects the definitions of the models that it knows of, which these are not.
    """
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
