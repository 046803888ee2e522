"""Tools in the form of chat templates."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from mlx_server.errors import BadRequest

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """`parameters` is a JSON schema; empty ones mean an empty object."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    # Templates read both.
    schema = {"type": "object", **parameters} if parameters else NO_PARAMETERS
    return {"type": "function", "function": function | {"parameters": schema} | more}


def call_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Of a call in a conversation. Where the text process cannot be given them, as integers beyond
    64 bits, they become the one value of an object, lest the conversation be refused from then on.
    """
    try:
        msgspec.msgpack.encode(given)
    except (OverflowError, RecursionError, ValueError):
        return {"arguments": json.dumps(given, ensure_ascii=False)}
    return given


def check_names(names: Iterable[str]) -> None:
    """Raises BadRequest for one that comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadRequest(f"There are two tools of the name '{name}'.", param="tools")
        seen.add(name)
