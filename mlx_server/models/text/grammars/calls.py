"""Grammars of tool calls."""

import re
from collections.abc import Mapping
from typing import Any

from mlx_server.models.text.grammars.arguments import Unwritable, arguments
from mlx_server.models.text.grammars.json_schema import Unkept, child_place
from mlx_server.models.text.grammars.lark import Lark, text_without
from mlx_server.models.text.grammars.recursion import ending_schema
from mlx_server.models.text.grammars.regular import pattern_of, whole_pattern
from mlx_server.models.text.styles.json_calls import json_style
from mlx_server.models.text.syntax import SLOTS, CallStyle, CallSyntax
from mlx_server.schemas.internal import ToolUse

MAX_CALLS = 16
JSON_CALL = r'\s*\[?\s*\{\s*"(name|tool_name|tool_call_id|type|id)"'
PYTHON_CALL = r"\[\s*[A-Za-z0-9_.\-]+\("
SLOT = re.compile("(" + "|".join(map(re.escape, SLOTS)) + ")")
OPEN_KEYWORDS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
"""These allow properties beyond `properties`."""


def forced_calls(lark: Lark, style: CallStyle, use: ToolUse) -> str:
    """Raises Unkept."""
    start = lark.exactly(style.syntax.start)
    if style.syntax.anywhere and start:
        start = f"({start})?"
    return lark.rule("calls", f"{start} {_calls(lark, style, use)}")


def optional_calls(lark: Lark, style: CallStyle, use: ToolUse) -> str:
    """Any text; whatever begins like a call must be one. Raises Unkept."""
    syntax = style.syntax
    calls = _calls(lark, style, use)
    unmarked = (*syntax.others, *syntax.bare)
    text = " & ".join([text_without(*unmarked), *map(_never, _shapes(syntax))])
    if not syntax.end:
        # Calls last to the answer's end. Of JSON the marker is often missing.
        unmarked_calls = ""
        if syntax.json or not syntax.start:
            text = f"{text} & ~/\\s*[\\[{{](?s:.*)/"
            unmarked_calls = f"{calls} | "
        if not syntax.start:
            return lark.rule("talk", f"{unmarked_calls}{lark.rule('TALK', text)}")
        said = lark.rule("TALK", f"{text} & {text_without(syntax.start)}")
        marked = f"{lark.text_until(syntax.start, text)} {calls}"
        return lark.rule("talk", f"{unmarked_calls}{said} | {marked}")
    call = lark.rule("said", f"{lark.text_until(syntax.start, text)} {calls}")
    again = f"{{0,{MAX_CALLS}}}" if use.parallel else "?"
    last = lark.rule("TALK", f"{text} & {text_without(syntax.start)}")
    return lark.rule("talk", f"{call}{again} {last}")


def _shapes(syntax: CallSyntax) -> list[str]:
    """Patterns of what begins a call without any marker."""
    before = "(?s:.*)" if syntax.anywhere else ""
    shapes = [before + JSON_CALL]
    if syntax.pythonic:
        shapes.append("(?s:.*)" + PYTHON_CALL)
    return shapes


def _never(shape: str) -> str:
    return f"~/{shape}(?s:.*)/"


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
    if grammar := function.get("grammar"):
        parameters = _grammar_bound(parameters, grammar, f"tools[{index}].format")
    if parameters["type"] != "object":
        raise Unkept(place, "arguments must be an object")
    if "properties" in parameters and not OPEN_KEYWORDS & parameters.keys():
        parameters.setdefault("additionalProperties", False)
    try:
        return ending_schema(parameters)
    except Unkept as error:
        raise Unkept(child_place(place, error.place), error.reason) from error


def _grammar_bound(
    parameters: dict[str, Any], grammar: Mapping[str, str], place: str
) -> dict[str, Any]:
    """Raises Unkept."""
    try:
        lark = grammar["syntax"] == "lark"
        pattern = pattern_of(grammar["definition"]) if lark else grammar["definition"]
    except Unkept as error:
        raise Unkept(place, error.reason) from error
    [name] = parameters["properties"]
    bound = {"type": "string", "pattern": whole_pattern(pattern)}
    return {**parameters, "properties": {name: bound}}


def _calls(lark: Lark, style: CallStyle, use: ToolUse) -> str:
    calls = [_call(lark, style, use, index) for index in range(len(use.tools))]
    one = lark.rule("one_call", " | ".join(calls))
    ending = style.closing + style.syntax.end
    if not use.parallel or use.choice == "named" or style.between is None:
        listed = f"{one} {lark.exactly(ending)}"
    else:
        # A lexeme must not begin another that may stand in its place.
        common, between, ending = lark.factored(style.between, ending)
        again = f"({common} {between} {one}){{0,{MAX_CALLS - 1}}}"
        listed = f"{one} {again} {common} {ending}"
    return lark.rule("listed", f"{_slotted(lark, style.opening)} {listed}")


def _call(lark: Lark, style: CallStyle, use: ToolUse, index: int) -> str:
    schema = arguments_schema(use, index)
    try:
        symbol = arguments(lark, style.notation, schema)
    except Unwritable:
        # Any style's calls may be JSON.
        style = json_style(style.name, "", "")
        symbol = lark.schema(schema)
    name = use.tools[index]["function"]["name"]
    before = f"{_slotted(lark, style.before_name)} {lark.exactly(name)}"
    before = f"{before} {_slotted(lark, style.before_arguments)}"
    return lark.rule("call", f"{before} {symbol} {lark.exactly(style.after_arguments)}")


def _slotted(lark: Lark, text: str) -> str:
    parts = SLOT.split(text)
    return " ".join(f"/{SLOTS[part]}/" if part in SLOTS else lark.exactly(part) for part in parts)
