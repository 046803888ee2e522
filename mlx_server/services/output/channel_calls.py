"""Reads the streamed arguments of a call whose message has begun."""

import json
from typing import Any

from mlx_server.services.output.json_scan import ObjectScan
from mlx_server.services.output.pieces import Kind, Piece, PieceBuffer


class ChannelCall:
    """Passes a JSON object on as it comes, without what follows it. Other text, such as a builtin
    tool's code, is the value of the only argument that `function` takes, if it is a text.
    """

    def __init__(self, buffer: PieceBuffer, function: dict[str, Any]) -> None:
        self._buffer = buffer
        self._function = function
        self._scan: ObjectScan | None = None
        self._ended = False
        buffer.pieces.append(Piece(Kind.CALL, function["name"], 0))

    def read(self, text: str) -> None:
        buffer = self._buffer
        buffer.text += text
        if self._scan is None and buffer.text.lstrip().startswith("{"):
            buffer.hide_space()
            self._scan = ObjectScan("")
        if self._scan is not None and not self._ended:
            length, self._ended = self._scan.push(buffer.text)
            buffer.cut(Kind.ARGUMENTS, length)
        if self._ended:
            buffer.hide(len(buffer.text))

    def finish(self, complete: bool) -> None:
        buffer = self._buffer
        if self._scan is None and complete:
            arguments = self._arguments(buffer.text.strip())
            buffer.pieces.append(Piece(Kind.ARGUMENTS, arguments, len(buffer.text)))
            buffer.text = ""
        buffer.cut(Kind.ARGUMENTS, len(buffer.text))

    def _arguments(self, text: str) -> str:
        if not text:
            return "{}"
        name = _only_text(self._function.get("parameters") or {})
        return text if name is None else json.dumps({name: text}, ensure_ascii=False)


def _only_text(parameters: dict[str, Any]) -> str | None:
    """The argument that a text alone must be meant for."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return None
    required = parameters.get("required")
    names = required if isinstance(required, list) and required else list(properties)
    known = len(names) == 1 and _may_be_text(properties.get(names[0]))
    return str(names[0]) if known else None


def _may_be_text(schema: Any) -> bool:
    types = schema.get("type", "string") if isinstance(schema, dict) else None
    return "string" in (types if isinstance(types, list) else [types])
