"""Calls that are a name, and then JSON or Python arguments."""

from dataclasses import replace

from mlx_server.models.text.syntax import (
    BracedArguments,
    CallStyle,
    CallSyntax,
    PythonArguments,
)

QUOTES = ('"', '"')
WORD = r"(?P<name>[\w.:/-]+)"

MISTRAL_HEADERS = CallStyle(
    name="mistral-headers",
    syntax=CallSyntax("[TOOL_CALLS]", "", json=False),
    before_name="",
    before_arguments="[ARGS]",
    after_arguments="",
    between="[TOOL_CALLS]",
    header=rf"(?:\[TOOL_CALLS\]\s*)?{WORD}\s*(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\]",
    signs=("[TOOL_CALLS]", "[ARGS]"),
)
MISTRAL_IDS = replace(
    MISTRAL_HEADERS,
    name="mistral-ids",
    before_arguments="[CALL_ID]{id}[ARGS]",
    signs=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
KIMI = CallStyle(
    name="kimi",
    syntax=CallSyntax(
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        json=False,
        bare=("<|tool_call_begin|>",),
    ),
    before_name="<|tool_call_begin|>functions.",
    before_arguments=":{index}<|tool_call_argument_begin|>",
    after_arguments="<|tool_call_end|>",
    between="",
    header=r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^<]+?)(?::\d+)?\s*"
    r"<\|tool_call_argument_begin\|>",
    signs=("<|tool_calls_section_begin|>",),
)
DEEPSEEK = CallStyle(
    name="deepseek",
    syntax=CallSyntax(
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        json=False,
        bare=("<｜tool▁call▁begin｜>",),
    ),
    before_name="<｜tool▁call▁begin｜>",
    before_arguments="<｜tool▁sep｜>",
    after_arguments="<｜tool▁call▁end｜>",
    between="",
    header=r"<｜tool▁call▁begin｜>\s*(?:function\s*<｜tool▁sep｜>)?\s*(?P<name>[^\s<]+)\s*"
    r"(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?",
    signs=("<｜tool▁call▁begin｜>",),
)
"""From V3.1 on."""
DEEPSEEK_FENCED = replace(
    DEEPSEEK,
    name="deepseek-fenced",
    before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    before_arguments="\n```json\n",
    after_arguments="\n```<｜tool▁call▁end｜>",
    between="\n",
    signs=("<｜tool▁call▁begin｜>", "```json"),
)
"""V3 and R1."""
HUNYUAN = CallStyle(
    name="hunyuan",
    syntax=CallSyntax("<tool_calls>", "</tool_calls>", json=False, shields=(QUOTES,)),
    before_name="<tool_call>",
    before_arguments="\n```json\n",
    after_arguments="\n```\n</tool_call>",
    opening="\n",
    between="\n",
    closing="\n",
    header=r"<tool_call>\s*(?P<name>[^\s<`{]+)\s*```(?:json)?",
    signs=("<tool_calls>", "```json"),
)
SOLAR = CallStyle(
    name="solar",
    syntax=CallSyntax(
        *("<|tool_calls|>", "<|calls|>"),
        json=False,
        bare=("<|tool_call:begin|>",),
    ),
    before_name="<|tool_call:begin|>{index}<|tool_call:name|>",
    before_arguments="<|tool_call:args|>",
    after_arguments="<|tool_call:end|>",
    between="",
    header=r"<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>\s*(?P<name>[^<]+?)\s*"
    r"<\|tool_call:args\|>",
    signs=("<|tool_call:begin|>",),
)
FUNCTIONARY = CallStyle(
    name="functionary",
    syntax=CallSyntax("", "", json=False, bare=("<function=",)),
    before_name="<function=",
    before_arguments=">",
    after_arguments="</function>",
    between="",
    header=r"<function=(?P<name>[^>\s]+)\s*>",
    signs=("<function=", "</function>"),
)
LFM2 = CallStyle(
    name="lfm2",
    syntax=CallSyntax("<|tool_call_start|>", "<|tool_call_end|>", json=False, pythonic=True),
    before_name="",
    before_arguments="(",
    after_arguments=")",
    opening="[",
    between=", ",
    closing="]",
    notation=PythonArguments(),
    header=r"(?P<name>[\w.-]+?)(?:\.call)?\s*\(",
    signs=("<|tool_call_start|>",),
)
LFM2_LISTS = replace(LFM2, signs=("<|tool_list_start|>",))
LFM2_TOKENS = replace(LFM2, signs=(), tokens=("<|tool_call_start|>", "<|tool_call_end|>"))
PYTHONIC = replace(
    LFM2,
    name="pythonic",
    syntax=CallSyntax("", "", json=False, others=("<|python_start|>",), pythonic=True),
    ignored=("<|python_end|>",),
    signs=("func_name1(",),
)
"""Llama 3.2 and 4, ToolACE."""
OLMO = replace(
    LFM2,
    name="olmo",
    syntax=CallSyntax("<function_calls>", "</function_calls>", json=False, shields=(QUOTES,)),
    opening="\n",
    between="\n",
    closing="\n",
    signs=("<function_calls>",),
)
GEMMA = CallStyle(
    name="gemma",
    syntax=CallSyntax("<|tool_call>", "<tool_call|>", json=False),
    before_name="call:",
    before_arguments="",
    after_arguments="",
    between="<tool_call|><|tool_call>",
    notation=BracedArguments('<|"|>'),
    header=r"call:\s*(?P<name>[^\s{]+)\s*(?=\{)",
    signs=("<|tool_call>", "<tool_call|>"),
)
FUNCTION_GEMMA = replace(
    GEMMA,
    name="function-gemma",
    syntax=CallSyntax("<start_function_call>", "<end_function_call>", json=False),
    between="<end_function_call><start_function_call>",
    notation=BracedArguments("<escape>"),
    signs=("<start_function_call>",),
)
