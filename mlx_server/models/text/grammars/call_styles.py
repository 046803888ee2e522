"""The ways in which families write tool calls, and grammars for calls written in them.

Which way a model has is told by its template: through mlx-lm's own inference where mlx-lm has a
parser for it, by the markers in the template otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlx_server.models.text.adapters.base import CallSyntax
from mlx_server.models.text.grammars.arguments import (
    Unwritable,
    escaped_arguments,
    flat_escaped_arguments,
    json_arguments,
    xml_arguments,
)
from mlx_server.models.text.grammars.json_schema import Unkept, child_place, strict_schema
from mlx_server.models.text.grammars.lark import Lark, text_without
from mlx_server.models.text.grammars.markers import Markers
from mlx_server.schemas.internal import ToolUse

MAX_CALLS = 16
"""Calls that a grammar lets into one answer."""
OPENING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
"""Keywords through which an object may have properties beyond its own `properties`."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a family writes calls: the pieces around names and arguments, in their order.

    After `syntax.start` come `opening`, calls with `between` them, `closing` and `syntax.end`.
    A call is `before_name`, the name, `before_arguments`, the arguments, `after_arguments`.
    `marks` are texts of special tokens within, which the text of a call must show.
    """

    name: str
    syntax: CallSyntax
    before_name: str
    before_arguments: str
    after_arguments: str
    opening: str = ""
    between: str | None = None
    """None where an answer can hold one call only."""
    closing: str = ""
    marks: tuple[str, ...] = ()
    arguments: Callable[[Lark, Markers, Any], str] = json_arguments


def _json_objects(name: str, syntax: CallSyntax, opening: str, closing: str) -> CallStyle:
    """Objects of name and arguments, each between markers of its own."""
    return CallStyle(
        name=name,
        syntax=syntax,
        before_name='{"name": "',
        before_arguments=f'", "{syntax.arguments}": ',
        after_arguments="}",
        opening=opening,
        between=f"{closing}{syntax.end}{syntax.start}{opening}" if syntax.end else None,
        closing=closing,
    )


def _json_list(name: str, syntax: CallSyntax) -> CallStyle:
    """A list of objects of name and arguments."""
    return replace(_json_objects(name, syntax, "[", "]"), between=", ")


HERMES = replace(
    _json_objects("hermes", CallSyntax("<tool_call>", "</tool_call>", json=True), "\n", "\n"),
    between="\n</tool_call>\n<tool_call>\n",
)
GENERIC = replace(HERMES, name="generic")
LLAMA = _json_objects(
    "llama", CallSyntax("<|python_tag|>", "", json=True, arguments="parameters"), "", ""
)
PHI = _json_list("phi", CallSyntax("<|tool_call|>", "<|/tool_call|>", json=True))
MISTRAL = _json_list("mistral", CallSyntax("[TOOL_CALLS]", "", json=True))
MISTRAL_HEADERS = CallStyle(
    name="mistral-headers",
    syntax=CallSyntax("[TOOL_CALLS]", "", json=False),
    before_name="",
    before_arguments="[ARGS]",
    after_arguments="",
    between="[TOOL_CALLS]",
    marks=("[ARGS]",),
)
QWEN_CODER = CallStyle(
    name="qwen-coder",
    syntax=CallSyntax("<tool_call>", "</tool_call>", json=False),
    before_name="<function=",
    before_arguments=">\n",
    after_arguments="</function>",
    opening="\n",
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n",
    arguments=xml_arguments,
)
GEMMA = CallStyle(
    name="gemma",
    syntax=CallSyntax("<|tool_call>", "<tool_call|>", json=False),
    before_name="call:",
    before_arguments="",
    after_arguments="",
    between="<tool_call|><|tool_call>",
    marks=('<|"|>',),
    arguments=escaped_arguments,
)
FUNCTION_GEMMA = CallStyle(
    name="function-gemma",
    syntax=CallSyntax("<start_function_call>", "<end_function_call>", json=False),
    before_name="call:",
    before_arguments="",
    after_arguments="",
    between="<end_function_call><start_function_call>",
    marks=("<escape>",),
    arguments=flat_escaped_arguments,
)
KIMI = CallStyle(
    name="kimi",
    syntax=CallSyntax("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", json=False),
    before_name="<|tool_call_begin|>functions.",
    before_arguments=":0<|tool_call_argument_begin|>",
    after_arguments="<|tool_call_end|>",
    between="",
    marks=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
STYLES = {
    "json_tools": HERMES,
    "mistral": MISTRAL,
    "qwen3_coder": QWEN_CODER,
    "gemma4": GEMMA,
    "function_gemma": FUNCTION_GEMMA,
    "kimi_k2": KIMI,
}
"""By the name of mlx-lm's parser."""


def find_style(template: str, parser: str | None, start: str, end: str) -> CallStyle | None:
    """How a model with this chat template writes calls; None if that cannot be told.

    `parser` names mlx-lm's parser for it, if there is one, and `start` and `end` are its markers.
    """
    if parser == "mistral" and "[ARGS]" in template:
        return MISTRAL_HEADERS
    if parser in STYLES:
        return STYLES[parser]
    if parser is not None:
        # Its own notation is read, and grammars write JSON between its markers.
        syntax = CallSyntax(start, end, json=False)
        return _json_objects(parser, syntax, "", "")
    if "<|tool_call|>" in template or "<|tool|>" in template:
        return PHI
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return LLAMA
    return None


def forced_calls(lark: Lark, markers: Markers, style: CallStyle, use: ToolUse) -> str:
    """Calls and nothing else, as a symbol of `lark`. Raises Unkept."""
    body = _calls(lark, markers, style, use)
    return lark.rule("calls", f"{markers.symbols(style.syntax.start)} {body}")


def calls_at_will(lark: Lark, markers: Markers, style: CallStyle, use: ToolUse) -> str:
    """Any text, in which whatever begins like a call is one, as a symbol of `lark`."""
    start = style.syntax.start
    if style.syntax.json and not style.syntax.end:
        return _calls_or_talk(lark, markers, style, use)
    said = f"{markers.text_until(lark, start)} {_calls(lark, markers, style, use)}"
    call = lark.rule("said", said)
    again = f"{{0,{MAX_CALLS}}}" if use.parallel else "?"
    return lark.rule("talk", f"{call}{again} {markers.text_without(lark, start)}")


def _calls_or_talk(lark: Lark, markers: Markers, style: CallStyle, use: ToolUse) -> str:
    """The same where calls end the answer, and are taken for such without a marker, too."""
    calls, marker = _calls(lark, markers, style, use), style.syntax.start
    text = lark.rule("TALK", f"{text_without(marker)} & ~/\\s*[\\[{{](?s:.*)/")
    return lark.rule("talk", f"{calls} | {text} ({markers.symbols(marker)} {calls})?")


def parameters_place(index: int) -> str:
    """Where a tool's parameters stand."""
    return f"tools[{index}].function.parameters"


def arguments_schema(use: ToolUse, index: int) -> Any:
    """The strict schema of a tool's arguments: an object, and closed unless it says otherwise.

    Where the model is free to call or not, a tool that is not strict takes any object, as it
    would if nothing else were bound. Raises Unkept.
    """
    function = use.tools[index]["function"]
    if use.choice == "auto" and not function.get("strict"):
        return {"type": "object"}
    place = parameters_place(index)
    parameters = {"type": "object", **(function.get("parameters") or {})}
    if parameters["type"] != "object":
        raise Unkept(place, "arguments must be an object")
    if "properties" in parameters and not OPENING & parameters.keys():
        parameters.setdefault("additionalProperties", False)
    try:
        return strict_schema(parameters)
    except Unkept as error:
        raise Unkept(child_place(place, error.place), error.reason) from error


def _calls(lark: Lark, markers: Markers, style: CallStyle, use: ToolUse) -> str:
    """What follows the start marker."""
    calls = [_call(lark, markers, style, use, index) for index in range(len(use.tools))]
    one = lark.rule("one_call", " | ".join(calls))
    several = one
    if use.parallel and use.choice != "named" and style.between is not None:
        several = f"{one} ({markers.symbols(style.between)} {one}){{0,{MAX_CALLS - 1}}}"
    ending = markers.symbols(style.closing + style.syntax.end)
    return lark.rule("listed", f"{markers.symbols(style.opening)} {several} {ending}")


def _call(lark: Lark, markers: Markers, style: CallStyle, use: ToolUse, index: int) -> str:
    schema = arguments_schema(use, index)
    try:
        arguments = style.arguments(lark, markers, schema)
    except Unwritable:
        # Every family's calls may be written as JSON between its markers: it is read first.
        style = _json_objects(style.name, style.syntax, "", "")
        arguments = json_arguments(lark, markers, schema)
    name = use.tools[index]["function"]["name"]
    before = markers.symbols(style.before_name + name + style.before_arguments)
    return lark.rule("call", f"{before} {arguments} {markers.symbols(style.after_arguments)}")
