"""Tool-call syntaxes, tools and completions for tests of what the front reads in them."""

import re
from collections.abc import Sequence

from mlx_server.models.text.syntax import CallSyntax, Reasoning
from mlx_server.schemas.internal import ToolUse

THINK = Reasoning("<think>", "</think>")
HERMES = CallSyntax("<tool_call>", "</tool_call>", json=True)
MISTRAL = CallSyntax("[TOOL_CALLS]", "", json=True)
LLAMA = CallSyntax("<|python_tag|>", "", json=True, anywhere=True)
OTHER = CallSyntax("<call>", "</call>", json=False)
ENDLESS = CallSyntax("[CALL]", "", json=False)
SYNTAXES = [HERMES, MISTRAL, LLAMA, OTHER, ENDLESS]

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("add", "weather")
]
USE = ToolUse(TOOLS)
ONE = ToolUse(TOOLS, parallel=False)


def parse(text: str) -> list[tuple[str, str]]:
    """The calls in blocks that are not JSON as expected: `add(a=1); weather(city="X")`."""
    pattern = r"(\w+)\((?:(\w+)=([^)]*))?\)"
    if not re.fullmatch(rf"\s*{pattern}(; {pattern})*\s*", text):
        return []
    return [
        (name, f'{{"{key}": {value}}}' if key else "{}")
        for name, key, value in re.findall(pattern, text)
    ]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def pieces_of(text: str, sizes: Sequence[int]) -> list[str]:
    """`text` in pieces of these sizes, and what is left."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    return [*pieces, text[start:]]
