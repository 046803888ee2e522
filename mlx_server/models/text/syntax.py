"""How models write thinking and tool calls; `grammars/` is built from this."""

import re
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Reasoning:
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Markers around one or several calls; an `end` of "" is the answer's end. `json`: objects with
    `name` before `arguments`, which stream. Others are parsed once complete.
    """

    start: str
    end: str
    json: bool
    arguments: str = "arguments"


@dataclass(frozen=True, slots=True)
class Syntax:
    reasoning: Reasoning | None = None
    calls: CallSyntax | None = None
    channels: bool = False
    """Instead of both: answers are messages in `channels`."""
    visible: dict[int, str] = field(default_factory=dict)
    """Special tokens that readers need, though they have no bytes."""


ArgumentNotation = Literal["json", "qwen-xml", "gemma", "function-gemma"]


@dataclass(frozen=True, slots=True)
class CallStyle:
    """`syntax.start`, `opening`, calls joined by `between`, `closing`, `syntax.end`. A call is
    `before_name`, name, `before_arguments`, arguments, `after_arguments`.
    """

    name: str
    syntax: CallSyntax
    before_name: str
    before_arguments: str
    after_arguments: str
    opening: str = ""
    between: str | None = None
    """None: one call per answer."""
    closing: str = ""
    marks: tuple[str, ...] = ()
    notation: ArgumentNotation = "json"


def json_style(name: str, syntax: CallSyntax, opening: str = "", closing: str = "") -> CallStyle:
    """Each call between its own markers."""
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


def _json_list_style(name: str, syntax: CallSyntax) -> CallStyle:
    return replace(json_style(name, syntax, "[", "]"), between=", ")


HERMES = replace(
    json_style("hermes", CallSyntax("<tool_call>", "</tool_call>", json=True), "\n", "\n"),
    between="\n</tool_call>\n<tool_call>\n",
)
GENERIC = replace(HERMES, name="generic")
"""For templates without tools: the prompt describes this style."""
LLAMA = json_style("llama", CallSyntax("<|python_tag|>", "", json=True, arguments="parameters"))
PHI = _json_list_style("phi", CallSyntax("<|tool_call|>", "<|/tool_call|>", json=True))
MISTRAL = _json_list_style("mistral", CallSyntax("[TOOL_CALLS]", "", json=True))
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
    notation="qwen-xml",
)
GEMMA = CallStyle(
    name="gemma",
    syntax=CallSyntax("<|tool_call>", "<tool_call|>", json=False),
    before_name="call:",
    before_arguments="",
    after_arguments="",
    between="<tool_call|><|tool_call>",
    marks=('<|"|>',),
    notation="gemma",
)
FUNCTION_GEMMA = CallStyle(
    name="function-gemma",
    syntax=CallSyntax("<start_function_call>", "<end_function_call>", json=False),
    before_name="call:",
    before_arguments="",
    after_arguments="",
    between="<end_function_call><start_function_call>",
    marks=("<escape>",),
    notation="function-gemma",
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
"""By mlx-lm parser name."""
TOOLS = re.compile(r"\btools\b")
KNOWN_REASONING = (Reasoning("<think>", "</think>"), Reasoning("[THINK]", "[/THINK]"))


def find_call_style(wrapper: Any, template: str, fallback: CallStyle | None) -> CallStyle | None:
    """None without a chat template. `wrapper` is mlx-lm's; `fallback` is for templates that render
    tools but no calls.
    """
    if not wrapper.has_chat_template:
        return None
    if template and not TOOLS.search(template):
        return GENERIC
    return _mlx_lm_style(wrapper, template) or _template_style(template) or fallback or GENERIC


def _mlx_lm_style(wrapper: Any, template: str) -> CallStyle | None:
    if wrapper.tool_parser is None:
        return None
    parser = wrapper.tool_parser.__module__.rpartition(".")[2]
    if parser == "mistral" and "[ARGS]" in template:
        return MISTRAL_HEADERS
    if parser in STYLES:
        return STYLES[parser]
    # mlx-lm parses the notation; grammars write JSON.
    start, end = wrapper.tool_call_start or "", wrapper.tool_call_end or ""
    return json_style(parser, CallSyntax(start, end, json=False))


def _template_style(template: str) -> CallStyle | None:
    if "<|tool_call|>" in template or "<|tool|>" in template:
        return PHI
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return LLAMA
    return None


def find_reasoning(wrapper: Any, template: str) -> Reasoning | None:
    if wrapper.has_thinking:
        return Reasoning(wrapper.think_start, wrapper.think_end)
    vocab = wrapper.get_vocab()
    for known in KNOWN_REASONING:
        if all(marker in vocab or marker in template for marker in (known.start, known.end)):
            return known
    return None


class Thinking(Enum):
    OPEN = "the block has begun"
    POSSIBLE = "the model may begin one"
    DONE = "no block comes any more"


def thinking_after(opening: str, reasoning: Reasoning | None) -> Thinking:
    if reasoning is None:
        return Thinking.DONE
    start, end = opening.rfind(reasoning.start), opening.rfind(reasoning.end)
    if start > end:
        return Thinking.OPEN
    return Thinking.POSSIBLE if end < 0 else Thinking.DONE
