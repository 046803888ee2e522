"""Responses' items as chats' messages, tools by their groups, and sealed thinking."""

from pathlib import Path
from typing import Any

import pytest

from mlx_server.api.openai.responses.thinking import Sealer
from mlx_server.api.openai.responses.tools import ToolBox
from mlx_server.api.openai.responses.translation import messages
from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.responses.requests import ResponseRequest


def request(**fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"model": "m", "input": "Hello"} | fields)


def told(items: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    body = request(input=items)
    assert isinstance(body.input, list)
    return messages(None, body.input, Sealer(folder))


def test_thinking_text_and_calls_become_one_message(tmp_path: Path) -> None:
    thinking = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    patch = {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "+x"}
    results = [
        {"type": "function_call_output", "call_id": "c1", "output": "a"},
        {
            "type": "custom_tool_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "b"}],
        },
    ]
    searched = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}}
    user = {"role": "user", "content": "Go"}
    found = told([user, thinking, said, searched, call, patch, *results, thinking, said], tmp_path)
    look = {"name": "look", "arguments": "{}"}
    assert found == [
        {"role": "user", "content": "Go"},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "I look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": look},
                {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "+x"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a"},
        {"role": "tool", "tool_call_id": "c2", "content": "b"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look."},
    ]


def test_two_answers_stay_two_messages(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "A"}
    assert [one["content"] for one in told([said, {**said, "content": "B"}], tmp_path)] == [
        "A",
        "B",
    ]


FUNCTION = {"type": "function", "name": "f"}


def test_groups_are_flattened_and_found_again() -> None:
    group = {"type": "namespace", "name": "g", "description": "About g.", "tools": [FUNCTION]}
    box = ToolBox.of(request(tools=[FUNCTION, group, {"type": "web_search"}]).tools)
    assert [one["function"]["name"] for one in box.tools] == ["f", "g__f"]
    assert (box.named["g__f"].name, box.named["g__f"].namespace) == ("f", "g")
    chosen = {"type": "function", "name": "f", "namespace": "g"}
    choice = request(tool_choice=chosen).tool_choice
    assert box.choice(choice) == {"type": "function", "function": {"name": "g__f"}}
    clash = request(tools=[group, {"type": "function", "name": "g__f"}])
    with pytest.raises(BadRequest):
        ToolBox.of(clash.tools)


def test_hosted_tools_alone_are_no_tools() -> None:
    body = request(tools=[{"type": "web_search"}, {"type": "mcp", "authorization": "secret"}])
    box = ToolBox.of(body.tools)
    assert (box.tools, box.choice("auto")) == ([], "none")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    assert box.choice(request(tool_choice=allowed).tool_choice) == "none"
    assert "secret" not in body.model_dump_json()


def test_sealed_thinking_is_read_by_servers_of_one_home_alone(tmp_path: Path) -> None:
    sealed = Sealer(tmp_path / "a").sealed("Hm, ü.")
    assert Sealer(tmp_path / "a").opened(sealed) == "Hm, ü."
    assert (tmp_path / "a" / "thinking.key").stat().st_mode & 0o077 == 0
    assert Sealer(tmp_path / "a").opened("another server's") is None
    for changed in (sealed[:-3] + "AAA", "mlx1.", "mlx1.é", sealed + "A"):
        with pytest.raises(BadRequest):
            Sealer(tmp_path / "a").opened(changed)
    with pytest.raises(BadRequest):
        Sealer(tmp_path / "b").opened(sealed)
