"""Calls in words, in each style, are what the server reads as calls."""

import json

import pytest

from mlx_server.models.text.parsing.calls import parse_calls
from mlx_server.models.text.styles.finding import KNOWN, LAST
from mlx_server.models.text.styles.json_calls import GENERIC
from mlx_server.models.text.styles.writing import write_calls
from mlx_server.models.text.syntax import SLOTS, CallStyle

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "now": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}},
    }
    for name in ("look", "hear")
]
ARGUMENTS = {"city": "Rome", "days": 3, "now": True, "tags": ["a", "b"]}
STYLES = {style.name: style for style in (*KNOWN, *LAST, GENERIC)}


def between(style: CallStyle, text: str) -> str:
    inside = text.removeprefix(style.syntax.start)
    return inside.removesuffix(style.syntax.end) if style.syntax.end else inside


@pytest.mark.parametrize("name", STYLES)
def test_a_call_in_words_is_read_back_as_it_was(name: str) -> None:
    style = STYLES[name]
    text = write_calls([{"name": "look", "arguments": ARGUMENTS}], style)
    [(called, arguments)] = parse_calls(between(style, text), TOOLS, style, None)
    assert (called, json.loads(arguments)) == ("look", ARGUMENTS)


@pytest.mark.parametrize("name", STYLES)
def test_all_calls_of_an_answer_are_told(name: str) -> None:
    functions = [{"name": one, "arguments": {"city": one}} for one in ("look", "hear")]
    text = write_calls(functions, STYLES[name])
    assert text.index("look") < text.index("hear")
    assert not any(slot in text for slot in SLOTS)
