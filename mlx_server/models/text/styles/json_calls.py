"""Calls that are JSON objects, alone or in a list."""

from dataclasses import replace

from mlx_server.models.text.syntax import CallStyle, CallSyntax


def json_style(
    name: str,
    start: str,
    end: str,
    *,
    opening: str = "",
    closing: str = "",
    signs: tuple[str, ...] = (),
) -> CallStyle:
    """Each call between its own markers."""
    return CallStyle(
        name=name,
        syntax=CallSyntax(start, end, json=True),
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        opening=opening,
        between=f"{closing}{end}{start}{opening}" if end else None,
        closing=closing,
        signs=signs,
    )


def list_style(name: str, start: str, end: str, *signs: str) -> CallStyle:
    """One list between the markers."""
    style = json_style(name, start, end, opening="[", closing="]", signs=signs)
    return replace(style, between=", ")


HERMES = replace(
    json_style("hermes", "<tool_call>", "</tool_call>", opening="\n", closing="\n"),
    between="\n</tool_call>\n<tool_call>\n",
    signs=("<tool_call>",),
)
GENERIC = replace(HERMES, name="generic", signs=())
"""For templates without tools: the prompt describes this style."""
EXAONE = replace(
    json_style("exaone", "<tool_call>", "</tool_call>"),
    between="</tool_call>\n<tool_call>",
    signs=('<tool_call>{"name"',),
)
FALCON = replace(
    list_style("falcon", "<tool_call>", "</tool_call>", "<tool_call>\n["),
    opening="\n[",
    closing="]\n",
)
LLAMA = replace(
    json_style("llama", "<|python_tag|>", ""),
    syntax=CallSyntax("<|python_tag|>", "", json=True, anywhere=True),
    before_arguments='", "parameters": ',
    signs=("<|python_tag|>",),
)
LLAMA_BARE = replace(
    LLAMA,
    name="llama-bare",
    syntax=CallSyntax(
        *("", ""),
        json=True,
        others=("<|python_tag|>", "<|python_start|>"),
        anywhere=True,
        pythonic=True,
    ),
    ignored=("<|python_end|>",),
    signs=('"parameters": ',),
)
XLAM = replace(
    list_style("xlam", "", "", "in a single JSON array"),
    syntax=CallSyntax("", "", json=True, anywhere=True),
)
PHI = list_style("phi", "<|tool_call|>", "<|/tool_call|>", "<|tool_call|>")
PHI_TOOLS = replace(PHI, signs=("<|tool|>",))
FUNCTOOLS = list_style("functools", "functools", "", "functools[")
GRANITE = replace(
    list_style("granite", "<|tool_call|>", "", "<|tool_call|>", "<|start_of_role|>"),
    syntax=CallSyntax("<|tool_call|>", "", json=True, others=("<tool_call>",)),
)
MISTRAL = list_style("mistral", "[TOOL_CALLS]", "", "[TOOL_CALLS]")
NEMOTRON = list_style("nemotron", "<TOOLCALL>", "</TOOLCALL>", "<TOOLCALL>")
TOOL_CALLS = list_style("tool-calls", "<tool_calls>", "</tool_calls>", "<tool_calls>")
"""Hunyuan A13B, Jamba and Apriel."""
MINIMAX_M1 = replace(
    json_style("minimax-m1", "<tool_calls>", "</tool_calls>", opening="\n", closing="\n"),
    between="\n",
    signs=("<tool_calls>\n{",),
)
INTERNLM = json_style(
    "internlm",
    "<|action_start|><|plugin|>",
    "<|action_end|>",
    opening="\n",
    signs=("<|action_start|><|plugin|>",),
)
GIGACHAT = replace(
    json_style("gigachat", "function call<|role_sep|>", "", opening="\n"),
    signs=("function call", "<|role_sep|>"),
)
COMMAND = replace(
    list_style("command", "<|START_ACTION|>", "<|END_ACTION|>", "<|START_ACTION|>"),
    before_name='{"tool_call_id": "{index}", "tool_name": "',
    before_arguments='", "parameters": ',
    opening="[\n    ",
    between=",\n    ",
    closing="\n]",
)
COMMAND_R = replace(
    json_style("command-r", "Action: ```json", "```", signs=('"tool_name"', "Action:")),
    before_name='{\n        "tool_name": "',
    before_arguments='",\n        "parameters": ',
    after_arguments="\n    }",
    opening="\n[\n    ",
    between=",\n    ",
    closing="\n]",
)
APERTUS = replace(
    list_style("apertus", "<|tools_prefix|>", "<|tools_suffix|>", "<|tools_prefix|>"),
    syntax=CallSyntax("<|tools_prefix|>", "<|tools_suffix|>", json=False),
    before_name='{"',
    before_arguments='": ',
)
"""Names are keys."""
