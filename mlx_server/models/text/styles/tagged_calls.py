"""Calls whose arguments stand between tags."""

import re
from dataclasses import replace

from mlx_server.models.text.syntax import CallStyle, CallSyntax, TaggedArguments

QWEN_CODER = CallStyle(
    name="qwen-coder",
    syntax=CallSyntax(
        *("<tool_call>", "</tool_call>"),
        json=False,
        bare=("<function=",),
        shields=(("<parameter=", "</parameter>"),),
    ),
    before_name="<function=",
    before_arguments=">\n",
    after_arguments="</function>",
    opening="\n",
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n",
    notation=TaggedArguments(
        *("<parameter=", ">\n", "\n</parameter>\n"),
        key=r"<parameter=\s*(?P<key>[^>]+?)\s*>\n?",
    ),
    header=r"<function=\s*(?P<name>[^>\s]+)\s*>",
    signs=("<tool_call>\n<function=",),
)
SEED = replace(
    QWEN_CODER,
    name="seed",
    syntax=replace(QWEN_CODER.syntax, start="<seed:tool_call>", end="</seed:tool_call>"),
    between="\n</seed:tool_call>\n<seed:tool_call>\n",
    notation=TaggedArguments(
        *("<parameter=", ">", "</parameter>\n"),
        key=r"<parameter=\s*(?P<key>[^>]+?)\s*>",
    ),
    signs=("<seed:tool_call>",),
)
MINIMAX = CallStyle(
    name="minimax",
    syntax=CallSyntax(
        *("<minimax:tool_call>", "</minimax:tool_call>"),
        json=False,
        bare=("<invoke name=",),
        shields=(("<parameter name=", "</parameter>"),),
    ),
    before_name='<invoke name="',
    before_arguments='">\n',
    after_arguments="</invoke>",
    opening="\n",
    between="\n",
    closing="\n",
    notation=TaggedArguments(
        *('<parameter name="', '">', "</parameter>\n"),
        key=r'<parameter\s+name="?(?P<key>[^">]+)"?\s*>',
    ),
    header=r'<invoke\s+name="?(?P<name>[^">]+?)"?\s*>',
    signs=("<minimax:tool_call>",),
)
MINICPM = CallStyle(
    name="minicpm",
    syntax=CallSyntax("", "", json=False, bare=("<function name=",)),
    before_name='<function name="',
    before_arguments='">',
    after_arguments="</function>",
    between="",
    notation=TaggedArguments(
        *('<param name="', '">', "</param>"),
        key=r'<param\s+name="?(?P<key>[^">]+)"?\s*>',
    ),
    header=r'<function\s+name="?(?P<name>[^">]+?)"?\s*>',
    signs=('<function name="', '<param name="'),
)


def _pairs(name: str, prefix: str, gap: str, *signs: str) -> CallStyle:
    """A tag for each key, and one for its value."""
    start, end = f"<{prefix}tool_call>", f"</{prefix}tool_call>"
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    return CallStyle(
        name=name,
        syntax=CallSyntax(start, end, json=False, shields=((f"<{value}>", f"</{value}>"),)),
        before_name="",
        before_arguments=gap,
        after_arguments="",
        between=f"{end}\n{start}",
        notation=TaggedArguments(
            *(f"<{key}>", f"</{key}>{gap}<{value}>", f"</{value}>{gap}"),
            key=rf"<{key}>\s*(?P<key>[^<]+?)\s*</{key}>\s*<{value}>",
        ),
        header=r"(?P<name>[^\s<({]+)",
        signs=signs,
    )


GLM_LINES = _pairs("glm-lines", "", "\n", "</arg_key>\n<arg_value>")
"""4.5 and 4.6."""
GLM = _pairs("glm", "", "", "<arg_key>")
LONGCAT = _pairs("longcat", "longcat_", "\n", "<longcat_tool_call>")


def _markup(name: str, token: str, block: str, *signs: str) -> CallStyle:
    other = {"function_calls": "tool_calls", "tool_calls": "function_calls"}[block]
    word = re.escape(token)
    return CallStyle(
        name=name,
        syntax=CallSyntax(
            *(f"<{token}{block}>", f"</{token}{block}>"),
            json=False,
            others=(f"<{token}{other}>",),
            bare=(f"<{token}invoke name=",),
            shields=((f"<{token}parameter name=", f"</{token}parameter>"),),
        ),
        before_name=f'<{token}invoke name="',
        before_arguments='">\n',
        after_arguments=f"</{token}invoke>",
        opening="\n",
        between="\n",
        closing="\n",
        notation=TaggedArguments(
            *(f'<{token}parameter name="', '" string="true">', f"</{token}parameter>\n"),
            key=rf'<{word}parameter\s+name="(?P<key>[^"]+)"(?:\s+string="(?P<kind>\w+)")?\s*>',
            middle_json='" string="false">',
        ),
        header=rf'<{word}invoke\s+name="(?P<name>[^"]+)"\s*>',
        signs=signs,
    )


DEEPSEEK_MARKUP = _markup("deepseek-markup", "｜DSML｜", "function_calls", "｜DSML｜")
"""V3.2."""
DEEPSEEK_MARKUP_TOKENS = replace(DEEPSEEK_MARKUP, signs=(), tokens=("｜DSML｜",))
DEEPSEEK_TOOL_CALLS = _markup(
    "deepseek-tool-calls", "｜DSML｜", "tool_calls", "｜DSML｜", "tool_calls>"
)
"""V4."""
GIGACHAT_MARKUP = _markup("gigachat-markup", "｜GCML｜", "tool_calls", "｜GCML｜")
