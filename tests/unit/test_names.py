"""Names of tools that a syntax cannot spell have stand-ins."""

import re
from typing import Any

import pytest

from mlx_server.models.text.names import spell
from mlx_server.models.text.styles.headed_calls import (
    FUNCTION_GEMMA,
    GEMMA,
    KIMI,
    MISTRAL_HEADERS,
)
from mlx_server.models.text.styles.json_calls import HERMES
from mlx_server.models.text.styles.tagged_calls import QWEN_CODER
from mlx_server.models.text.syntax import CallStyle
from mlx_server.schemas.internal import ChatPrompt, TextPrompt, ToolUse

STYLES = [HERMES, QWEN_CODER, GEMMA, FUNCTION_GEMMA, MISTRAL_HEADERS, KIMI]


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def prompt(*names: str) -> ChatPrompt:
    """A round trip with the first of these tools, and with one that is gone."""
    calls = [{"id": "1", **tool(names[0])}, {"id": "2", **tool("gone.by")}]
    messages = [
        {"role": "user", "content": "Hello", "name": names[0]},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "42", "name": names[0]},
        {"role": "tool", "content": "43"},
    ]
    tools = [tool(name) for name in names]
    return ChatPrompt(messages, tools, use=ToolUse(tools[:1], "named", names[0]))


def shown(style: CallStyle, *names: str) -> tuple[ChatPrompt, dict[str, str]]:
    spelled = spell(prompt(*names), style.syntax)
    assert isinstance(spelled.prompt, ChatPrompt)
    return spelled.prompt, dict(spelled.names)


@pytest.mark.parametrize(
    ("style", "name"),
    [
        (HERMES, "catalog.get-entity"),
        (HERMES, "mcp__" + "a" * 70),
        (HERMES, "a tool/φ:1"),
        (QWEN_CODER, "catalog.get-entity"),
        (KIMI, "catalog.get-entity"),
        (GEMMA, "get-entity"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_name_that_can_be_spelled_passes_through(style: CallStyle, name: str) -> None:
    sent = ChatPrompt([], [tool(name)])
    assert spell(sent, style.syntax).prompt is sent


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_any_other_name_has_a_stand_in_wherever_it_stands(style: CallStyle) -> None:
    odd = 'a <b>"\\ {c}'
    changed, names = shown(style, odd)
    [new] = [name for name, own in names.items() if own == odd]
    assert re.fullmatch(style.syntax.spelling, new)
    assert changed.tools is not None
    assert changed.use is not None
    assert changed.tools[0]["function"]["name"] == changed.use.name == new
    assert changed.use.tools[0]["function"]["name"] == new
    assert changed.messages[1]["tool_calls"][0]["function"]["name"] == new
    assert changed.messages[2]["name"] == new
    assert changed.messages[0] == prompt(odd).messages[0]
    assert changed.messages[3] == prompt(odd).messages[3]


def test_stand_ins_differ_and_stay_the_same_from_turn_to_turn() -> None:
    names = ("a.b", "a_b", "a b", "a-b")
    _, before = shown(FUNCTION_GEMMA, *names)
    assert sorted(before.values()) == ["a b", "a-b", "a.b", "gone.by"]
    assert not before.keys() & set(names)
    assert shown(FUNCTION_GEMMA, *names)[1] == before


def test_without_tools_or_their_syntax_nothing_is_changed() -> None:
    for sent in (TextPrompt("a.b"), ChatPrompt([{"role": "user", "content": "a.b"}])):
        assert spell(sent, FUNCTION_GEMMA.syntax).prompt is sent
    sent = prompt("a.b")
    assert spell(sent, None).prompt is sent
