"""Grammars of tool calls."""

from typing import Any

from mlx_server.models.text.grammars.arguments import Unwritable, arguments, json_arguments
from mlx_server.models.text.grammars.json_schema import Unkept, child_place
from mlx_server.models.text.grammars.lark import Lark, text_without
from mlx_server.models.text.grammars.recursion import ending_schema
from mlx_server.models.text.syntax import CallStyle, json_style
from mlx_server.schemas.internal import ToolUse

MAX_CALLS = 16
OPEN_KEYWORDS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
"""These allow properties beyond `properties`."""


def forced_calls(lark: Lark, style: CallStyle, use: ToolUse) -> str:
    """Raises Unkept."""
    return lark.rule("calls", f"{lark.exactly(style.syntax.start)} {_calls(lark, style, use)}")


def optional_calls(lark: Lark, style: CallStyle, use: ToolUse) -> str:
    """Any text; whatever begins like a call must be one. Raises Unkept."""
    start = style.syntax.start
    calls = _calls(lark, style, use)
    if style.syntax.json and not style.syntax.end:
        # Calls without a start marker are recognised too; they end the answer.
        text = lark.rule("TALK", f"{text_without(start)} & ~/\\s*[\\[{{](?s:.*)/")
        return lark.rule("talk", f"{calls} | {text} ({lark.exactly(start)} {calls})?")
    call = lark.rule("said", f"{lark.text_until(start)} {calls}")
    again = f"{{0,{MAX_CALLS}}}" if use.parallel else "?"
    return lark.rule("talk", f"{call}{again} {lark.text_without(start)}")


def parameters_place(index: int) -> str:
    return f"tools[{index}].function.parameters"


def arguments_schema(use: ToolUse, index: int) -> Any:
    """An object, closed unless it says otherwise; any object for an optional tool that is not
    strict. Raises Unkept.
    """
    function = use.tools[index]["function"]
    if use.choice == "auto" and not function.get("strict"):
        return {"type": "object"}
    place = parameters_place(index)
    parameters = {"type": "object", **(function.get("parameters") or {})}
    if parameters["type"] != "object":
        raise Unkept(place, "arguments must be an object")
    if "properties" in parameters and not OPEN_KEYWORDS & parameters.keys():
        parameters.setdefault("additionalProperties", False)
    try:
        return ending_schema(parameters)
    except Unkept as error:
        raise Unkept(child_place(place, error.place), error.reason) from error


def _calls(lark: Lark, style: CallStyle, use: ToolUse) -> str:
    calls = [_call(lark, style, use, index) for index in range(len(use.tools))]
    one = lark.rule("one_call", " | ".join(calls))
    several = one
    if use.parallel and use.choice != "named" and style.between is not None:
        several = f"{one} ({lark.exactly(style.between)} {one}){{0,{MAX_CALLS - 1}}}"
    ending = lark.exactly(style.closing + style.syntax.end)
    return lark.rule("listed", f"{lark.exactly(style.opening)} {several} {ending}")


def _call(lark: Lark, style: CallStyle, use: ToolUse, index: int) -> str:
    schema = arguments_schema(use, index)
    try:
        symbol = arguments(lark, style.notation, schema)
    except Unwritable:
        # Any style's calls may be JSON.
        style = json_style(style.name, style.syntax)
        symbol = json_arguments(lark, schema)
    name = use.tools[index]["function"]["name"]
    before = lark.exactly(style.before_name + name + style.before_arguments)
    return lark.rule("call", f"{before} {symbol} {lark.exactly(style.after_arguments)}")
