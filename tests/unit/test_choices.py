"""An engine's rows as the events of a choice that may think and call tools."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.engine.protocol import FinishReason, Logprobs, Row
from mlx_server.errors import Unavailable
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.syntax import CallSyntax, Syntax
from mlx_server.models.text.tokenizer import TextTokenizer
from mlx_server.schemas.internal import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    ToolUse,
)
from mlx_server.services.output.choices import ParsedChoice
from mlx_server.services.output.completion import OutputReader
from tests.support.outputs import HERMES, LLAMA, ONE, OTHER, THINK, TOOLS, USE, hermes, parse
from tests.support.tiny import build_tiny_model, token_id


class Texts:
    """The text side of a model, as the front sees it."""

    def __init__(self, tokenizer: TextTokenizer, visible: Sequence[str] = ()) -> None:
        self.token_bytes = tokenizer.token_bytes
        self.token_name = tokenizer.token_name
        self._visible = {token_id(tokenizer.backend, name): name for name in visible}

    def visible_bytes(self, token: int) -> bytes:
        return self._visible.get(token, "").encode() or self.token_bytes(token)

    async def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        assert tools == TOOLS
        if "trouble" in text:
            raise Unavailable("The process ended.")
        return parse(text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    return load_adapter(build_tiny_model(folder, "qwen"), "qwen").tokenizer


def tokens_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_bare(text)


def row(tokens: Sequence[int], finish: FinishReason | None = None) -> Row:
    scores = [Logprobs(token, -1.0, [(token, -1.0)]) for token in tokens]
    return Row(0, list(tokens), finish=finish, logprobs=scores)


async def choose(
    tokenizer: TextTokenizer,
    said: str,
    *,
    calls: CallSyntax = HERMES,
    use: ToolUse | None = USE,
    stops: tuple[str, ...] = (),
    thinking: bool = False,
    finish: FinishReason = "stop",
    names: Mapping[str, str] = {},
) -> list[Event]:
    """The events of a choice whose tokens come one by one; a stop token ends them."""
    reader = OutputReader(Syntax(THINK, calls), use, thinking=thinking)
    choice = ParsedChoice(2, Texts(tokenizer), reader, use, stops, 7, names)
    events: list[Event] = []
    for token in tokens_of(tokenizer, said):
        events += await choice.take(row([token]))
        if events and isinstance(events[-1], Finished):
            return events
    last = [token_id(tokenizer.backend, "<|im_end|>")] if finish == "stop" else []
    return events + await choice.take(row(last, finish))


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def entries_of(events: Sequence[Event]) -> list[TokenLogprob]:
    return [entry for event in events if isinstance(event, TextDelta) for entry in event.logprobs]


def end_of(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


async def test_events_tell_thinking_text_and_calls_with_their_ids(tokenizer: TextTokenizer) -> None:
    calls = [hermes("add", '{"a": 1}'), hermes("weather", "{}")]
    events = await choose(tokenizer, f"<think>Hm, 日.</think>I add.{calls[0]}\n{calls[1]}")
    thought = [event.text for event in events if isinstance(event, ReasoningDelta)]
    assert "".join(thought) == "Hm, 日."
    assert len(thought) > 1
    assert text_of(events) == "I add."
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    assert [(start.call, start.name) for start in starts] == [(0, "add"), (1, "weather")]
    assert all(re.fullmatch("call_[A-Za-z0-9]{24}", start.id) for start in starts)
    assert starts[0].id != starts[1].id
    arguments = ["", ""]
    for event in events:
        if isinstance(event, ToolCallDelta):
            arguments[event.call] += event.arguments
    assert [json.loads(one) for one in arguments] == [{"a": 1}, {}]
    assert {event.choice for event in events} == {2}
    assert end_of(events).reason == "tool_calls"


async def test_tokens_of_thinking_are_counted_and_its_markers_are_not(
    tokenizer: TextTokenizer,
) -> None:
    thought = tokens_of(tokenizer, "Hello, world 日!")
    said = "<think>Hello, world 日!</think>Fine."
    usage = end_of(await choose(tokenizer, said)).usage
    assert usage.reasoning_tokens == len(thought)
    assert usage.completion_tokens == len(tokens_of(tokenizer, said)) + 1
    assert usage.prompt_tokens == 7
    cut_off = await choose(tokenizer, "Hello, world 日!", thinking=True, finish="length")
    assert end_of(cut_off).usage.reasoning_tokens == len(thought)
    assert end_of(cut_off).reason == "length"


async def test_entries_are_those_of_the_answers_tokens(tokenizer: TextTokenizer) -> None:
    answer = "Hello, wörld 日! <b>"
    events = await choose(tokenizer, f"<think>Hm.</think>{answer}{hermes('add', '{}')}")
    assert text_of(events) == answer
    entries = entries_of(events)
    assert b"".join(entry.bytes for entry in entries) == answer.encode()
    said = b""
    for entry in entries:
        assert entry.offset == len(said.decode(errors="ignore"))
        said += entry.bytes


@given(
    parts=st.lists(
        st.sampled_from(["Hello", " <", "</", "\n", "日本", "<tool", "é ", "{", "STOP", "ST"]),
        max_size=8,
    )
)
async def test_entries_join_to_a_text_in_which_nothing_is_found(
    tokenizer: TextTokenizer, parts: list[str]
) -> None:
    said = "Say: " + "".join(parts)
    events = await choose(tokenizer, said, finish="length")
    assert text_of(events) == said
    assert b"".join(entry.bytes for entry in entries_of(events)) == said.encode()


async def test_stop_strings_end_the_text_and_not_thinking_nor_arguments(
    tokenizer: TextTokenizer,
) -> None:
    call = hermes("add", '{"a": "STOP"}')
    events = await choose(
        tokenizer, f"<think>STOP here?</think>I {call} go STOP and on", stops=("STOP",)
    )
    assert text_of(events) == "Igo "
    assert end_of(events).reason == "tool_calls"
    told = "".join(event.arguments for event in events if isinstance(event, ToolCallDelta))
    assert told == '{"a": "STOP"}'
    events = await choose(tokenizer, "<think>Hm.</think>go STOP and on", stops=("STOP",))
    assert (text_of(events), end_of(events).reason) == ("go ", "stop")
    assert b"".join(entry.bytes for entry in entries_of(events)) == b"go "


async def test_no_stop_string_reaches_over_a_call(tokenizer: TextTokenizer) -> None:
    events = await choose(tokenizer, f"ST{hermes('add', '{}')}OP", stops=("STOP",))
    assert text_of(events) == "STOP"
    assert [type(event) for event in events if not isinstance(event, ToolCallDelta)] == [
        TextDelta, ToolCallStart, TextDelta, TextDelta, Finished
    ]  # fmt: skip


async def test_one_call_ends_a_choice_that_may_hold_one(tokenizer: TextTokenizer) -> None:
    said = '<tool_call>{"name": "add", "arguments": {}'
    events = await choose(tokenizer, said + "}</tool_call> more", use=ONE)
    assert text_of(events) == ""
    assert end_of(events).reason == "tool_calls"
    assert end_of(events).usage.completion_tokens <= len(tokens_of(tokenizer, said)) + 1


async def test_calls_that_cannot_be_parsed_for_want_of_a_process_are_text(
    tokenizer: TextTokenizer,
) -> None:
    said = "a <call>trouble</call> b"
    events = await choose(tokenizer, said, calls=OTHER)
    assert (text_of(events), end_of(events).reason) == (said, "stop")
    events = await choose(tokenizer, "a <call>add(a=1)</call> b", calls=OTHER)
    assert (text_of(events), end_of(events).reason) == ("ab", "tool_calls")


async def test_markers_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    tokenizer = load_adapter(build_tiny_model(tmp_path, "llama"), "llama").tokenizer
    texts = Texts(tokenizer, ["<|python_tag|>"])
    reader = OutputReader(Syntax(None, LLAMA), USE, thinking=False)
    choice = ParsedChoice(0, texts, reader, USE, (), 1, {})
    call = '{"name": "add", "parameters": {"a": 1}}'
    tokens = [token_id(tokenizer.backend, "<|python_tag|>"), *tokens_of(tokenizer, call)]
    end = token_id(tokenizer.backend, "<|eom_id|>")
    events = await choice.take(row([*tokens, end], "stop"))
    assert isinstance(events[0], ToolCallStart)
    assert end_of(events).reason == "tool_calls"
    assert text_of(events) == ""


async def test_a_call_has_the_tools_own_name(tokenizer: TextTokenizer) -> None:
    events = await choose(tokenizer, hermes("add", '{"a": 1}'), names={"add": "math.add"})
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == ["math.add"]
