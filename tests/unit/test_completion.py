"""Completions read while they come, against what they say as a whole."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.syntax import CallSyntax, Reasoning, Syntax
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.completion import OutputReader
from mlx_server.services.output.pieces import Kind, Piece
from tests.support.outputs import (
    ENDLESS,
    HERMES,
    LLAMA,
    MISTRAL,
    ONE,
    OTHER,
    PYTHONIC,
    SHIELDED,
    SYNTAXES,
    THINK,
    USE,
    hermes,
    parse,
    pieces_of,
)


@dataclass
class Outcome:
    """A completion's pieces, put together."""

    thinking: str = ""
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)
    parts: list[tuple[Kind, str, int]] = field(default_factory=list)
    """Pieces of one kind that follow each other are one."""


def read(
    text: str | Sequence[str],
    *,
    calls: CallSyntax | None = HERMES,
    reasoning: Reasoning | None = THINK,
    use: ToolUse | None = USE,
    thinking: bool = False,
    reason: FinishReason = "stop",
) -> Outcome:
    """Read a completion that comes whole or in pieces."""
    reader = OutputReader(Syntax(reasoning, calls), use, thinking=thinking)
    pieces: list[Piece] = []

    def take(new: list[Piece]) -> None:
        pieces.extend(new)
        while (block := reader.unparsed) is not None:
            pieces.extend(reader.parsed(parse(block)))

    for part in [text] if isinstance(text, str) else text:
        take(reader.push(part))
        if reader.done:
            return outcome(pieces)
    take(reader.finish(reason))
    if not reader.done:
        assert sum(piece.width for piece in pieces) == len("".join(text))
    return outcome(pieces)


def outcome(pieces: Sequence[Piece]) -> Outcome:
    """What `pieces` are together."""
    result = Outcome()
    for kind, group in groupby(pieces, lambda piece: piece.kind):
        together = list(group)
        if kind is Kind.CALL:
            result.calls += [[piece.text, ""] for piece in together]
        whole = "".join(piece.text for piece in together)
        if kind is Kind.ARGUMENTS:
            result.calls[-1][1] += whole
        result.text += whole if kind is Kind.TEXT else ""
        result.thinking += whole if kind is Kind.REASONING else ""
        result.parts.append((kind, whole, sum(piece.width for piece in together)))
    return result


# however it is cut

CALL = '{"name": "add", "arguments": {"a": "<}\\""}}'
PARTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
    *("<call>", "</call>", "[CALL]", "add(a=1)", "drop()", "; ", CALL, CALL + ", ", f"[{CALL}]"),
    *(f"<tool_call>{CALL}</tool_call>", f"<tool_call>[{CALL}, {CALL}]</tool_call>"),
    *(f"[TOOL_CALLS][{CALL}]", "<call>add(a=1); add()</call>", "<think>Hm.</think>"),
    *('{"name": "add", "arguments": ', '{"name": "add", "parameters": ', '{"name": "drop", '),
    *('{"a": 1}', '{"b": {"c": ["}", "</tool_call>"]}}', "{", "}", "[", "]", ",", '"', "\\", ":"),
    *("<calls>", "<add>", "<a>", "</a>", '"', "[add(", "[add(a=1)]", "[drop(", 'add(a="</call>")'),
    *('"id": "x1"', "<", "<t", "</t", "[T", "<th", "hello", " ", "\n", "日", " " * 150),
]
SIZES = st.lists(st.integers(0, 6), max_size=60)


@pytest.mark.parametrize("calls", SYNTAXES, ids=lambda syntax: syntax.start)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=12),
    sizes=SIZES,
    use=st.sampled_from([USE, ONE, None]),
    thinking=st.booleans(),
    reason=st.sampled_from(["stop", "length"]),
)
def test_a_completion_says_the_same_however_it_is_cut(
    calls: CallSyntax,
    parts: list[str],
    sizes: list[int],
    use: ToolUse | None,
    thinking: bool,
    reason: FinishReason,
) -> None:
    text = "".join(parts)
    options: dict[str, Any] = {"calls": calls, "use": use, "thinking": thinking, "reason": reason}
    whole = read(text, **options)
    assert read(pieces_of(text, sizes), **options) == whole
    assert read(list(text), **options) == whole


@given(parts=st.lists(st.sampled_from(PARTS), max_size=12), sizes=SIZES)
def test_what_is_neither_thinking_nor_a_call_is_text_to_the_letter(
    parts: list[str], sizes: list[int]
) -> None:
    text = "".join(parts)
    unread = read(pieces_of(text, sizes), use=None, reasoning=None)
    assert (unread.text, unread.thinking, unread.calls) == (text, "", [])
    result = read(pieces_of(text, sizes), reasoning=None)
    if not result.calls:
        assert result.text == text


# thinking


@pytest.mark.parametrize(
    ("said", "thinking", "thought", "text"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.\n", "Yes."),
        ("Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("\n\nHm.</think>\n\n Yes. ", True, "Hm.", "Yes. "),
        ("<think>never ends", False, "never ends", ""),
        ("never </thin ends", True, "never </thin ends", ""),
        ("never ends </thi", True, "never ends </thi", ""),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("</think>Yes.", True, "", "Yes."),
        ("\n<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("<thinking> is", False, "", "<thinking> is"),
        ("The <think> tag </think>", False, "", "The <think> tag </think>"),
        ("<think>a <think> b</think>c</think>", False, "a <think> b", "c</think>"),
        ("<think>a</think>\n<think>b</think>c", False, "ab", "c"),
        ("Yes.", False, "", "Yes."),
        ("\n Yes.\n", False, "", "\n Yes.\n"),
        ("<thi", False, "", "<thi"),
        ("  ", False, "", "  "),
        ("", True, "", ""),
    ],
)
@pytest.mark.parametrize("use", [None, USE])
def test_thinking_and_text_separate(
    said: str, thinking: bool, thought: str, text: str, use: ToolUse | None
) -> None:
    for pieces in ([said], list(said)):
        result = read(pieces, thinking=thinking, use=use)
        assert (result.thinking, result.text, result.calls) == (thought, text, [])


@pytest.mark.parametrize(
    "markers",
    [
        THINK,
        Reasoning("[THINK]", "[/THINK]"),
        Reasoning("<|channel>thought", "<channel|>"),
        Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
        Reasoning("◁think▷", "◁/think▷"),
    ],
    ids=lambda markers: markers.start,
)
def test_each_familys_markers_of_thinking_are_seen(markers: Reasoning) -> None:
    said = f"{markers.start}\nHm, < and [ and 日.{markers.end}\n\nYes."
    for pieces in ([said], list(said), [said[:3], said[3:]]):
        result = read(pieces, reasoning=markers)
        assert (result.thinking, result.text) == ("Hm, < and [ and 日.", "Yes.")


def test_a_call_among_the_thinking_is_thought() -> None:
    result = read("<think>" + hermes("add", "{}") + "</think>" + hermes("weather", "{}"))
    assert result.thinking == hermes("add", "{}")
    assert result.calls == [["weather", "{}"]]


def test_a_model_may_think_again_after_a_call() -> None:
    result = read(hermes("add", "{}") + "\n<think>Hm.</think>\nYes.")
    assert (result.calls, result.thinking, result.text) == ([["add", "{}"]], "Hm.", "Yes.")


# calls

ARGUMENTS = '{"a": [1, {"b": "}\\"]</tool_call>{"}], "ü": null}'


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (HERMES, hermes("add", ARGUMENTS)),
        (HERMES, f'<tool_call>{{"name":"add","arguments":{ARGUMENTS}}}</tool_call>'),
        (HERMES, f'<tool_call>[{{"name": "add", "arguments": {ARGUMENTS}}}]</tool_call>'),
        (HERMES, f'<tool_call>{{"name": "add", "arguments": {ARGUMENTS}, "id": 1}}</tool_call>'),
        (HERMES, f'<tool_call>{{"name": "add", "arguments": {ARGUMENTS}</tool_call>'),
        (HERMES, f'<tool_call>{{"name": "add", "arguments": {ARGUMENTS}}}'),
        (HERMES, f'<tool_call>{{"name": "\\u0061dd", "arguments": {ARGUMENTS}}}</tool'),
        (MISTRAL, f'[TOOL_CALLS] [{{"name": "add", "arguments": {ARGUMENTS}}}]'),
        (MISTRAL, f'[TOOL_CALLS][{{"name": "add", "arguments": {ARGUMENTS}, "id": "a}}b"}}]'),
        (LLAMA, f'<|python_tag|>{{"name": "add", "parameters": {ARGUMENTS}}}'),
        (LLAMA, f'{{"name": "add", "parameters": {ARGUMENTS}}}'),
        (LLAMA, f'\n[{{"name": "add", "parameters": {ARGUMENTS}}}]\n'),
    ],
)
def test_a_calls_arguments_are_the_json_that_was_generated(calls: CallSyntax, said: str) -> None:
    for pieces in ([said], list(said)):
        result = read(pieces, calls=calls)
        assert result.calls == [["add", ARGUMENTS]]
        assert (result.text, result.thinking) == ("", "")


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (HERMES, hermes("add", '{"a": 1}') + "\n" + hermes("weather", "{}")),
        (HERMES, '<tool_call>[{"name": "add", "arguments": {"a": 1}}, '
                 '{"name": "weather", "arguments": {}}]</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}}\n'
                 '{"name": "weather", "arguments": {}}</tool_call>'),
        (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, '
                  '{"name": "weather", "arguments": {}}]'),
        (MISTRAL, '[TOOL_CALLS]{"name": "add", "arguments": {"a": 1}}'
                  '[TOOL_CALLS]{"name": "weather", "arguments": {}}'),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}; {"name": "weather", "parameters": {}}'),
        (OTHER, "<call>add(a=1); weather()</call>"),
        (OTHER, "<call>add(a=1)</call> <call>weather()</call>"),
        (ENDLESS, "[CALL]add(a=1); weather()"),
    ],
)  # fmt: skip
def test_several_calls_are_counted_in_their_order(calls: CallSyntax, said: str) -> None:
    for pieces in ([said], list(said)):
        result = read(pieces, calls=calls)
        assert (result.calls, result.text) == ([["add", '{"a": 1}'], ["weather", "{}"]], "")
        assert read(pieces, calls=calls, use=ONE).calls == [["add", '{"a": 1}']]


def test_text_around_calls_stays_and_white_space_around_them_goes() -> None:
    add, weather = hermes("add", "{}"), hermes("weather", "{}")
    result = read(f"\n I'll look.\n\n{add}\n \nAnd then: {weather} \n Done. ")
    assert result.text == "\n I'll look.And then:Done. "
    assert result.calls == [["add", "{}"], ["weather", "{}"]]


def test_a_name_is_told_before_its_arguments_and_those_as_they_come() -> None:
    reader = OutputReader(Syntax(None, HERMES), USE, thinking=False)
    assert reader.push('<tool_call>{"name": "add", "argu') == []
    started = reader.push('ments": {')
    assert [(p.kind, p.text) for p in started if p.width == 0] == [(Kind.CALL, "add")]
    assert started[-1] == Piece(Kind.ARGUMENTS, "{", 1)
    assert reader.push('"a": "<') == [Piece(Kind.ARGUMENTS, '"a": "<', 7)]
    assert reader.push("/tool") == [Piece(Kind.ARGUMENTS, "/tool", 5)]


def test_markers_stay_in_the_text_when_no_tool_may_be_called() -> None:
    said = "Look: " + hermes("add", "{}")
    assert read(said, use=None).text == said
    assert read("<think>Hm.</think>" + said, use=None).text == said


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (LLAMA, 'I look.\n\n{"name": "add", "parameters": {"a": 1}}'),
        (LLAMA, 'I look. [{"type": "function", "name": "add", "parameters": {"a": 1}}]'),
        (PYTHONIC, "I look.\n[add(a=1)]"),
        (SHIELDED, "I look. <calls>add(a=1)"),
    ],
)
def test_calls_after_text_need_no_marker_of_the_usual_kind(calls: CallSyntax, said: str) -> None:
    for pieces in ([said], list(said)):
        result = read(pieces, calls=calls)
        assert (result.text, [name for name, _ in result.calls]) == ("I look.", ["add"])


def test_text_that_begins_no_marker_is_not_held_back() -> None:
    reader = OutputReader(Syntax(THINK, HERMES), USE, thinking=False)
    assert reader.push("a <") == [Piece(Kind.TEXT, "a", 1)]
    assert reader.push("b") == [Piece(Kind.TEXT, " <b", 3)]
    assert reader.push(" <tool") == []
    assert reader.push("s") == [Piece(Kind.TEXT, " <tools", 7)]


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (HERMES, "<tool_call>"),
        (HERMES, "  <tool_call> \n </tool_call> "),
        (HERMES, "Well: <tool_call>no JSON</tool_call> then."),
        (HERMES, "a <tool_call>[]</tool_call> b"),
        (HERMES, "a <tool_call>{}</tool_call> b"),
        (HERMES, 'a\n<tool_call>{"name": "add"}</tool_call> b'),
        (HERMES, "a " + hermes("drop", "{}") + " b"),
        (HERMES, "a " + hermes("add", '"text"')),
        (HERMES, "a " + hermes("add", "[1]")),
        (HERMES, '<tool_call>{"arguments": {}, "name": "add"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "a\\xdd", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": '),
        (HERMES, '<tool_call>{"name": "' + "a" * 3000 + '", "arguments": {}}</tool_call>'),
        (HERMES, "<tool_call>" + " " * 3000 + "</tool_call>"),
        (MISTRAL, "[TOOL_CALLS]"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "drop", "arguments": {}}]'),
        (LLAMA, '{"answer": 42}'),
        (LLAMA, 'So: {"name": "drop", "parameters": {}}'),
        (HERMES, 'So: {"name": "add", "arguments": {}}'),
        (HERMES, '{"name": "add"}'),
        (OTHER, "a <call>add[a=1]</call> b"),
        (OTHER, "a <call>add(a=1); drop()</call> b"),
        (OTHER, "a <call>add(a=1)<call>"),
        (ENDLESS, "a [CALL]who knows?"),
    ],
)
def test_a_garbled_call_is_given_back_to_the_letter(calls: CallSyntax, said: str) -> None:
    for pieces in ([said], list(said)):
        result = read(pieces, calls=calls)
        assert (result.text, result.calls) == (said, [])


def test_a_call_after_a_garbled_one_is_a_call() -> None:
    result = read("<tool_call>\n" + hermes("add", "{}"))
    assert (result.text, result.calls) == ("<tool_call>", [["add", "{}"]])
    result = read(hermes("drop", "{}") + hermes("add", "{}"))
    assert (result.text, result.calls) == (hermes("drop", "{}"), [["add", "{}"]])


def test_of_a_block_that_is_garbled_in_the_middle_the_calls_stay_and_the_rest_is_text() -> None:
    call = '{"name": "add", "arguments": {}}'
    unknown = '{"name": "drop", "arguments": {}}'
    result = read(f"<tool_call>[{call}, {unknown}]</tool_call> b")
    assert (result.calls, result.text) == ([["add", "{}"]], f", {unknown}]</tool_call> b")
    result = read(f"<tool_call>{call} oh</tool_call> b")
    assert (result.calls, result.text) == ([["add", "{}"]], "oh</tool_call> b")
    result = read(f"[TOOL_CALLS][{call}] Done; see.", calls=MISTRAL)
    assert (result.calls, result.text) == ([["add", "{}"]], "Done; see.")


@pytest.mark.parametrize("said", ['{"a": 1', '{"a": "x</tool_call>', '{"a": [1, 2', '{"a": "\\'])
def test_arguments_that_were_cut_off_stay_as_far_as_they_came(said: str) -> None:
    result = read(f'<tool_call>{{"name": "add", "arguments": {said}', reason="length")
    assert (result.calls, result.text) == ([["add", said]], "")


def test_half_a_call_is_no_call() -> None:
    said = "a <call>add(a=1)"
    assert read(said, calls=OTHER).calls == [["add", '{"a": 1}']]
    assert read(said, calls=OTHER, reason="length").text == said


@pytest.mark.parametrize(
    "flood",
    [
        "<tool_call>" * 20_000 + "</tool_call>",
        "<tool_call>{" * 20_000,
        "<tool_call>" + " " * 100_000,
        " " * 100_000,
        "<think>" + "</thin" * 15_000,
        '<tool_call>{"name": "add", "arguments": {"a": "' + "\\" * 100_001,
        '<tool_call>{"name": "add", "arguments": {}}' + " ,;" * 30_000,
        '<tool_call>{"name": "add", "arguments": ' + '{"a":' * 20_000,
        *("{[" * 30_000, '{"id": "' * 10_000, '{"id": "x", ' * 5_000, "[add" * 15_000),
        *("<add>" + '"\\' * 30_000, "<add>" + '"' * 30_000, "<call><a>" + "</" * 30_000),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("calls", [HERMES, SHIELDED, PYTHONIC], ids=["json", "tags", "python"])
def test_whatever_a_model_says_is_read_in_linear_time(calls: CallSyntax, flood: str) -> None:
    started = time.process_time()
    read(re.findall(".{1,3}", flood), calls=calls)
    assert time.process_time() - started < 5
