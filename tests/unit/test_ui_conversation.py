"""Conversations of the page: branches, requests, keeping."""

import pytest

from mlx_server.ui.chat.conversation import ROOT, Call, Conversation, Lane, Options, request_body


def talk() -> Lane:
    lane = Lane(model="m")
    lane.append("user", "one")
    lane.append("assistant", "first")
    return lane


def said(lane: Lane) -> list[str]:
    return [message.content for message in lane.path()]


def test_a_retry_and_an_edit_branch_and_each_branch_can_be_shown_again() -> None:
    lane = talk()
    mine, answer = lane.path()
    lane.add(mine.id, "assistant", "second")
    assert said(lane) == ["one", "second"]
    edited = lane.add(mine.parent, "user", "other")
    lane.add(edited.id, "assistant", "third")
    assert said(lane) == ["other", "third"]
    assert [one.content for one in lane.siblings(mine)] == ["one", "other"]
    lane.choose(mine)
    assert said(lane) == ["one", "second"]
    lane.choose(answer)
    assert said(lane) == ["one", "first"]


def test_a_request_has_the_branch_above_it_and_only_what_was_set() -> None:
    lane = talk()
    later = lane.append("user", "two")
    body = request_body(lane, Options(system="Be short.", temperature=0.0, stop="a\n\nb"), later.id)
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "two"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "stop": ["a", "b"],
    }
    assert request_body(lane, Options(), ROOT)["messages"] == []


def test_calls_go_back_with_their_results() -> None:
    lane = talk()
    answer = lane.path()[-1]
    answer.calls = [Call("c1", "look", "{}", result="seen")]
    messages = request_body(lane, Options(), answer.id)["messages"]
    assert messages[-1] == {"role": "tool", "tool_call_id": "c1", "content": "seen"}
    assert messages[-2]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


def test_a_schema_binds_answers_and_one_that_is_no_json_is_named() -> None:
    body = Options(schema='{"type": "object"}', tools="[]").body()
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body["tools"] == []
    with pytest.raises(ValueError, match="JSON schema of the settings is not JSON"):
        Options(schema="{").body()


def test_a_conversation_comes_back_from_the_browser_as_it_was() -> None:
    conversation = Conversation(lanes=[talk(), Lane(model="other")])
    conversation.lanes[0].path()[1].thought_seconds = 1.5
    again = Conversation.from_json(conversation.to_json())
    assert again == conversation
    assert again.title == "one"
    assert "## Assistant\n\nfirst" in again.to_markdown()
