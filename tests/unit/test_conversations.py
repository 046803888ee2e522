"""Repairs of conversations, one by one, and the forms of calls."""

from typing import Any

import pytest

from mlx_server.models.text.conversations import repairs
from mlx_server.models.text.conversations.forms import CallForm, call_forms
from mlx_server.models.text.conversations.repairs import (
    REPAIRS,
    Message,
    Messages,
    Repair,
    repaired,
)


def said(letters: str) -> Messages:
    """A conversation: the role's first letter, then its words, up to the next space."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages: Messages = []
    for word in letters.split():
        if word[0] == "c":
            calls = [{"id": one, "function": {"name": one}} for one in word[1:]]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif word[0] == "t":
            messages.append({"role": "tool", "tool_call_id": word[1:], "content": word[1:]})
        else:
            messages.append({"role": roles[word[0]], "content": word[1:]})
    return messages


def told(messages: Messages) -> str:
    """The reverse, with texts that were joined apart by a plus."""
    return " ".join(map(_told, messages))


def _told(message: Message) -> str:
    if calls := message.get("tool_calls"):
        return "c" + "".join(call["id"] for call in calls)
    content = message["content"].replace("\n\n", "+").replace(" ", "_")
    content = content.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
    return message["role"][0] + content


@pytest.mark.parametrize(
    ("repair", "given", "made"),
    [
        (repairs.place_systems, "s1 s2 u3 s4 a5", "s1+2 u3 u4 a5"),
        (repairs.place_systems, "u1 s2", "u1 u2"),
        (repairs.place_systems, "u1 cxy s2 tx s3 ty s4 a5", "u1 cxy tx ty u2 u3 u4 a5"),
        (repairs.place_systems, "s1 u2 a3", "s1 u2 a3"),
        (repairs.split_calls, "u1 cxy ty tx a2", "u1 cx tx cy ty a2"),
        (repairs.split_calls, "cxy tz cxy ty", "cx cy tz cx cy ty"),
        (repairs.split_calls, "cx tx", "cx tx"),
        (repairs.drop_empty_answers, "u1 a u2 a3 cx", "u1 u2 a3 cx"),
        (repairs.tell_stray_results, "u1 tx cy ty tz a2 tx", "u1 ux cy ty tz a2 ux"),
        (repairs.join_turns, "s1 s2 u3 u4 u5 a6 a7 u8", "s1 s2 u3+4+5 a6+7 u8"),
        (repairs.join_turns, "u1 cx tx ty u2", "u1 cx tx ty u2"),
        (repairs.fold_system, "s1 u2 a3", "u1+2 a3"),
        (repairs.fold_system, "s1 a2", "u1 a2"),
        (repairs.fold_system, "u1 s2", "u1 s2"),
        (repairs.alternate, "a1 u2 u3", "u_ a1 u2 a_ u3"),
        (repairs.alternate, "s1 u2 cx tx u3", "s1 u2 cx tx a_ u3"),
        (repairs.alternate, "cx tx a1", "u_ cx tx a1"),
        (repairs.alternate, "u1 a2 u3", "u1 a2 u3"),
    ],
)
def test_a_repair_changes_what_it_is_for_and_no_more(repair: Repair, given: str, made: str) -> None:
    messages = said(given)
    assert told(repair(messages)) == made
    assert messages == said(given), "the client's own messages have changed"


def test_joined_answers_keep_their_calls_and_thoughts() -> None:
    messages = [
        {"role": "assistant", "content": "One.", "reasoning_content": "Hm."},
        {**said("cx")[0], "reasoning_content": "Well."},
    ]
    [joined] = repairs.join_turns(messages)
    assert joined == {
        "role": "assistant",
        "content": "One.",
        "reasoning_content": "Hm.\n\nWell.",
        "tool_calls": messages[1]["tool_calls"],
    }


def test_repairs_are_tried_from_few_to_many_and_only_where_they_change_something() -> None:
    tried = [told(one) for one in repaired(said("s1 u2 s3 u4"), REPAIRS, tries=99)]
    assert tried[:3] == ["s1 u2 u3 u4", "u1+2 s3 u4", "s1 u2 s3 a_ u4"]
    assert len(tried) == len(set(tried))
    assert "u1+2+3+4" in tried
    assert not list(repaired(said("u1 a2 u3"), REPAIRS, tries=99))
    assert len(list(repaired(said("s1 u2 s3 u4"), REPAIRS, tries=2))) == 2


def test_the_usual_form_of_calls_is_tried_first_and_each_once() -> None:
    forms = list(call_forms())
    assert forms[0] == CallForm()
    assert len(forms) == len(set(forms)) == 48


def test_what_is_no_conversation_breaks_no_repair() -> None:
    odd: list[dict[str, Any]] = [
        {},
        {"role": 1},
        {"role": "user"},
        {"role": "assistant"},
        {"role": "tool"},
    ]
    for messages in ([], odd, odd[::-1]):
        assert isinstance(list(repaired(messages, REPAIRS, tries=30)), list)
