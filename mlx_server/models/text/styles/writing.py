"""Writes calls as a style has them, where the template does not."""

import json
from typing import Any

from mlx_server.models.text.styles.json_calls import GENERIC
from mlx_server.models.text.syntax import (
    BracedArguments,
    CallStyle,
    JsonArguments,
    PythonArguments,
    TaggedArguments,
)


def write_calls(functions: list[dict[str, Any]], style: CallStyle | None) -> str:
    """In the generic style where there is none."""
    style = style or GENERIC
    calls = [_written(style, function, index) for index, function in enumerate(functions)]
    if style.between is not None:
        calls = [style.between.join(calls)]
    begin, end = style.syntax.start + _filled(style.opening), style.closing + style.syntax.end
    return "\n".join(f"{begin}{one}{end}" for one in calls)


def _written(style: CallStyle, function: dict[str, Any], index: int) -> str:
    name = str(function.get("name") or "")
    if style.before_name.endswith('"'):
        name = json.dumps(name, ensure_ascii=False)[1:-1]
    before, between, after = (
        _filled(part, index)
        for part in (style.before_name, style.before_arguments, style.after_arguments)
    )
    return f"{before}{name}{between}{_arguments(style, _object(function))}{after}"


def _filled(part: str, index: int = 0) -> str:
    """With its slots filled in."""
    part = part.replace("{index}", str(index)).replace("{id}", f"{index:09}")
    return part.replace("{space}", "")


def _object(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments") or {}
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def _arguments(style: CallStyle, arguments: dict[str, Any]) -> str:
    match style.notation:
        case JsonArguments():
            return _json(arguments)
        case TaggedArguments() as tags:
            return "".join(_tagged(tags, key, value) for key, value in arguments.items())
        case PythonArguments():
            return ", ".join(f"{key}={_python(value)}" for key, value in arguments.items())
        case BracedArguments(escape=escape):
            return _braced(arguments, escape)


def _tagged(tags: TaggedArguments, key: str, value: Any) -> str:
    if isinstance(value, str):
        return f"{tags.start}{key}{tags.middle}{value}{tags.end}"
    return f"{tags.start}{key}{tags.middle_json or tags.middle}{_json(value)}{tags.end}"


def _python(value: Any) -> str:
    return _json(value) if isinstance(value, str) else repr(value)


def _braced(value: Any, escape: str) -> str:
    if isinstance(value, str):
        return f"{escape}{value}{escape}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_braced(one, escape)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_braced(one, escape) for one in value) + "]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
