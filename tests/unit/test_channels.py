"""Answers in channels, read as they stream: thinking, text and calls, however they are cut."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.channels import MARKS
from mlx_server.models.text.syntax import Thinking
from mlx_server.schemas.internal import Event, Finished, TextDelta, ToolUse
from mlx_server.services.output.channels import ChannelReader
from mlx_server.services.output.choices import ParsedChoice
from mlx_server.services.output.pieces import Kind, Piece
from tests.support.outputs import ONE, USE, pieces_of
from tests.support.tiny import build_tiny_model, token_id
from tests.unit.test_choices import row

PYTHON = {
    "type": "function",
    "function": {"name": "python", "parameters": {"properties": {"code": {"type": "string"}}}},
}


def marked(text: str) -> str:
    """What a reader gets for `text`, in which each mark is a special token."""
    return re.sub(r"<\|\w+\|>", lambda match: MARKS[match[0]], text)


@dataclass
class Outcome:
    thinking: str = ""
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)
    done: bool = False


def read(
    text: str | Sequence[str],
    *,
    use: ToolUse | None = USE,
    opening: Thinking = Thinking.POSSIBLE,
    reason: FinishReason = "stop",
) -> Outcome:
    """Read an answer that comes whole or in pieces."""
    reader = ChannelReader(use, opening)
    pieces: list[Piece] = []
    for part in [text] if isinstance(text, str) else text:
        pieces += reader.push(part)
        if reader.done:
            break
    else:
        pieces += reader.finish(reason)
    result = Outcome(done=reader.done)
    for kind, said, _ in pieces:
        result.thinking += said if kind is Kind.REASONING else ""
        result.text += said if kind is Kind.TEXT else ""
        if kind is Kind.CALL:
            result.calls.append([said, ""])
        if kind is Kind.ARGUMENTS:
            result.calls[-1][1] += said
    if not reader.done:
        assert sum(piece.width for piece in pieces) == len("".join(text))
    return result


def both(text: str, **options: Any) -> Outcome:
    """The same whole, and character by character."""
    said = marked(text)
    whole = read(said, **options)
    assert read(list(said), **options) == whole
    return whole


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
ADD = '{"a": [1, {"b": "}\\"{"}]}'


def test_each_channel_is_what_it_is_for() -> None:
    result = both(f"{THOUGHT}{FINAL}Yes.")
    assert (result.thinking, result.text, result.calls) == ("Hm.", "Yes.", [])


def test_messages_of_a_kind_are_paragraphs() -> None:
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    result = both(f"{THOUGHT}{preamble}{THOUGHT}{FINAL}Yes.")
    assert (result.thinking, result.text) == ("Hm.\n\nHm.", "I look.\n\nYes.")


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.add <|constrain|>json",
        "<|channel|>commentary to=functions.add<|constrain|>json",
        "<|channel|>commentary to=functions.add json",
        "<|channel|>commentary to=add",
        "<|channel|>commentary functions.add",
        "<|channel|>analysis to=functions.add code",
        "<|channel|>final to=functions.add <|constrain|>json",
        " to=functions.add<|channel|>commentary json",
        " to=functions.add<|channel|>commentary <|constrain|>json",
        " to=functions.add",
        "<|channel|>analysis<|channel|>commentary to=functions.add json",
    ],
)
def test_a_message_to_a_tool_is_a_call_wherever_its_recipient_stands(header: str) -> None:
    for before in ("", THOUGHT):
        for after in ("<|call|>", "<|end|>", ""):
            result = both(f"{before}{header}<|message|>{ADD}{after}")
            assert result.calls == [["add", ADD]]
            assert (result.text, result.thinking) == ("", "Hm." if before else "")


def test_a_name_is_told_before_its_arguments_and_those_as_they_come() -> None:
    reader = ChannelReader(USE, Thinking.POSSIBLE)
    assert reader.push(marked("<|channel|>commentary to=functions.add json")) == []
    told = reader.push(marked("<|message|>"))
    assert [piece.text for piece in told if piece.kind is Kind.CALL] == ["add"]
    assert reader.push('{"a": "x') == [Piece(Kind.ARGUMENTS, '{"a": "x', 8)]
    assert reader.push("\\") == []
    assert reader.push('"y') == [Piece(Kind.ARGUMENTS, '\\"y', 3)]


def test_thinking_and_text_are_told_as_they_come() -> None:
    reader = ChannelReader(None, Thinking.POSSIBLE)
    reader.push(marked("<|channel|>analysis<|message|>"))
    assert reader.push("Hm") == [Piece(Kind.REASONING, "Hm", 2)]
    reader.push(marked("<|end|><|start|>assistant<|channel|>final<|message|>"))
    assert reader.push(" <") == [Piece(Kind.TEXT, " <", 2)]


def test_several_calls_are_counted_in_their_order() -> None:
    one = "<|channel|>commentary to=functions.{}<|message|>{}<|end|><|start|>assistant"
    said = one.format("add", ADD) + THOUGHT + one.format("weather", "{}")
    assert both(said).calls == [["add", ADD], ["weather", "{}"]]
    alone = both(said, use=ONE)
    assert (alone.calls, alone.done) == ([["add", ADD]], True)


@pytest.mark.parametrize(
    "recipient", ["python", "browser.search", "functions.drop", "container.exec"]
)
@pytest.mark.parametrize("channel", ["analysis", "commentary"])
@pytest.mark.parametrize("use", [USE, None])
def test_a_message_to_a_tool_that_is_not_offered_is_thinking(
    recipient: str, channel: str, use: ToolUse | None
) -> None:
    result = both(f"<|channel|>{channel} to={recipient} code<|message|>print(1)<|call|>", use=use)
    assert (result.thinking, result.text, result.calls) == ("print(1)", "", [])


def test_a_builtin_tool_that_is_offered_is_called_with_its_code() -> None:
    use = ToolUse([PYTHON])
    result = both("<|channel|>analysis to=python code<|message|>print(1)\n<|call|>", use=use)
    assert result.calls == [["python", '{"code": "print(1)"}']]
    result = both('<|channel|>analysis to=python<|message|>{"code": "1"}<|call|>', use=use)
    assert result.calls == [["python", '{"code": "1"}']]


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("", "{}"),
        ("\n {} \n", "{}"),
        (f"{ADD} and so on", ADD),
        ("Rome", "Rome"),
        ('{"a": ', '{"a": '),
    ],
)
def test_arguments_are_the_object_or_what_the_model_said(said: str, arguments: str) -> None:
    result = both(f"<|channel|>commentary to=functions.add<|message|>{said}<|call|>")
    assert (result.calls, result.text) == ([["add", arguments]], "")


def test_a_call_without_its_message_mark_is_a_call() -> None:
    assert both("<|channel|>commentary to=functions.add json<|call|>").calls == [["add", "{}"]]
    cut_off = both("<|channel|>commentary to=functions.add", reason="length")
    assert (cut_off.calls, cut_off.text) == ([], "")


def test_arguments_that_were_cut_off_stay_as_far_as_they_came() -> None:
    said = '<|channel|>commentary to=functions.add<|message|>{"a": "x\\'
    assert both(said, reason="length").calls == [["add", '{"a": "x\\']]


@pytest.mark.parametrize(
    ("said", "thinking", "text"),
    [
        ("I must refuse.", "", "I must refuse."),
        ("to be or not", "", "to be or not"),
        ("to", "", "to"),
        (f"No way<|end|><|start|>assistant{THOUGHT}{FINAL}No.", "Hm.", "No way\n\nNo."),
        ("<|channel|>analysis I must refuse<|end|>", "I must refuse", ""),
        ("<|channel|>final Yes.", "", "Yes."),
        ("<|message|>Yes.", "", "Yes."),
        (f"<|channel|>analysis<|message|>Hm.<|start|>assistant{FINAL}Yes.", "Hm.", "Yes."),
        (f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Yes.", "Hm.", "Yes."),
        (f"<|channel|>analysis<|message|>Hm.{FINAL}Yes.", "Hm.", "Yes."),
        ("<|channel|>final<|message|>Yes<|message|>, yes", "", "Yes, yes"),
        ("<|channel|>musing<|message|>Hm.", "Hm.", ""),
        ("<|channel|>", "", ""),
        ("", "", ""),
        ("<|channel|>analysis " + "Hm. " * 200, "Hm. " * 200, ""),
    ],
)  # fmt: skip
def test_messages_that_lack_marks_are_read_as_far_as_they_can_be(
    said: str, thinking: str, text: str
) -> None:
    result = both(said)
    assert (result.thinking, result.text, result.calls) == (thinking, text, [])


def test_the_final_message_ends_the_answer() -> None:
    result = both(f"{FINAL}Yes.<|end|><|start|>assistant{FINAL}Yes.")
    assert (result.text, result.done) == ("Yes.", True)


def test_nobody_else_speaks_in_the_answer() -> None:
    for role in ("user", "functions.add to=assistant<|channel|>commentary"):
        result = both(f"{THOUGHT.removesuffix('assistant')}{role}<|message|>Go on!")
        assert (result.thinking, result.text, result.done) == ("Hm.", "", True)


def test_a_text_that_spells_marks_is_a_text() -> None:
    spelled = "Write <|end|><|start|>assistant<|channel|>analysis<|message|>."
    said = marked(FINAL) + spelled
    assert read(list(said)).text == spelled


@pytest.mark.parametrize(
    ("opening", "said"),
    [(Thinking.OPEN, f"Hm.<|end|><|start|>assistant{FINAL}Yes."), (Thinking.DONE, "Yes.")],
)
def test_an_answer_goes_on_where_its_prompt_ends(opening: Thinking, said: str) -> None:
    result = both(said, opening=opening)
    thinking = "Hm." if opening is Thinking.OPEN else ""
    assert (result.thinking, result.text) == (thinking, "Yes.")


def test_a_call_after_a_continued_answer_is_a_call() -> None:
    said = f"Yes.<|end|><|start|>assistant<|channel|>commentary to=functions.add<|message|>{ADD}"
    result = both(said, opening=Thinking.DONE)
    assert (result.text, result.calls) == ("Yes.", [["add", ADD]])


PARTS = [
    *(str(mark) for mark in MARKS.values()),
    *("assistant", "user", "analysis", "commentary", "final", " to=functions.add", "to=python"),
    *(
        "functions.weather",
        "json",
        "code",
        ADD,
        "{",
        "}",
        '"',
        "\\",
        "a",
        " ",
        "to",
        "日",
        "x" * 150,
    ),
    marked(THOUGHT),
    marked(FINAL),
]


@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=16),
    sizes=st.lists(st.integers(0, 6), max_size=60),
    use=st.sampled_from([USE, ONE, None, ToolUse([PYTHON])]),
    opening=st.sampled_from(Thinking),
    reason=st.sampled_from(["stop", "length"]),
)
def test_an_answer_says_the_same_however_it_is_cut_and_no_mark_is_told(
    parts: list[str],
    sizes: list[int],
    use: ToolUse | None,
    opening: Thinking,
    reason: FinishReason,
) -> None:
    text = "".join(parts)
    whole = read(text, use=use, opening=opening, reason=reason)
    assert read(pieces_of(text, sizes), use=use, opening=opening, reason=reason) == whole
    assert read(list(text), use=use, opening=opening, reason=reason) == whole
    told = whole.thinking + whole.text + json.dumps(whole.calls, ensure_ascii=False)
    assert not any(mark in told for mark in MARKS.values())


@pytest.mark.parametrize(
    "flood",
    [
        marked("<|channel|>") * 100_000,
        marked("<|start|>assistant") * 20_000,
        " " * 200_000,
        marked("<|channel|>commentary to=functions.add<|message|>") + '{"a":' * 40_000,
        marked("<|channel|>commentary to=functions.add<|message|>") + "x" * 200_000,
        marked("<|channel|>commentary to=functions.add<|message|>") + '{"a": "' + "\\" * 200_001,
    ],
    ids=range(6),
)
def test_whatever_a_model_says_is_read_in_linear_time(flood: str) -> None:
    started = time.process_time()
    read(re.findall(".{1,3}", flood))
    assert time.process_time() - started < 10


class Texts:
    """The text side of a model that answers in channels, as the front sees it."""

    def __init__(self, folder: Path) -> None:
        adapter = load_adapter(build_tiny_model(folder, "gpt-oss"), "gpt-oss")
        self.tokenizer = adapter.tokenizer
        self.token_bytes = adapter.tokenizer.token_bytes
        self.token_name = adapter.tokenizer.token_name
        self._visible = adapter.syntax.visible

    def visible_bytes(self, token: int) -> bytes:
        return self._visible.get(token, "").encode() or self.token_bytes(token)

    async def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        raise AssertionError("calls in channels need no parser")


async def test_log_probabilities_are_those_of_the_texts_tokens(tmp_path: Path) -> None:
    texts = Texts(tmp_path)
    choice = ParsedChoice(0, texts, ChannelReader(USE, Thinking.POSSIBLE), USE, ("stop",), 1, {})
    preamble = "<|channel|>commentary<|message|>I look, 日.<|end|><|start|>assistant"
    said = f"{THOUGHT}{preamble}{FINAL}It is {{this}}; stop there"
    events: list[Event] = []
    for token in texts.tokenizer.encode_bare(said):
        if not events or not isinstance(events[-1], Finished):
            events += await choice.take(row([token]))
    told = [event for event in events if isinstance(event, TextDelta)]
    assert "".join(event.text for event in told) == "I look, 日.\n\nIt is {this}; "
    entries = [entry for event in told for entry in event.logprobs]
    assert b"".join(entry.bytes for entry in entries) == "I look, 日.It is {this}; ".encode()
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.usage.reasoning_tokens == len(texts.tokenizer.encode_bare("Hm."))
    assert last.reason == "stop"


async def test_a_call_is_told_as_one_by_the_end_of_the_answer(tmp_path: Path) -> None:
    texts = Texts(tmp_path)
    choice = ParsedChoice(0, texts, ChannelReader(USE, Thinking.POSSIBLE), USE, (), 1, {})
    said = f"{THOUGHT}<|channel|>commentary to=functions.add <|constrain|>json<|message|>{ADD}"
    end = token_id(texts.tokenizer.backend, "<|call|>")
    events = await choice.take(row([*texts.tokenizer.encode_bare(said), end], "stop"))
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "tool_calls"
