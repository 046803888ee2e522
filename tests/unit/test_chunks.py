"""Chunks made from a template against the same chunks written in full by their models."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.openai import chat, completions
from mlx_server.api.openai.chunks import SYSTEM_FINGERPRINT, Header
from mlx_server.api.openai.logprobs import chat_logprobs, text_logprobs
from mlx_server.schemas.internal import ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta
from mlx_server.schemas.openai.chat import (
    CallDelta,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    FunctionDelta,
)
from mlx_server.schemas.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
)

CHOICES = 3
HEADER = Header("id-1", 1700000000, "m")
CHARACTERS = st.characters(exclude_categories=["Cs"])  # UTF-8 has no surrogates
NASTY = st.text(CHARACTERS | st.sampled_from('"\\/\0\b\t\n\f\r\x1f\x7f\x85\u2028\ufeff<&é🦙'))
TEXTS = st.lists(st.tuples(st.integers(0, CHOICES - 1), NASTY), min_size=1)
USAGES = [{}, {"stream_options": {"include_usage": True}}]
NAMES = ["m", '"', '{"text":"\0"}', '"\\u0000"', "\0"]


def in_full(
    kind: Any, name: str, choice: Any, header: Header, usage: dict[str, Any]
) -> list[StreamEvent]:
    told = {"usage": None} if usage else {}
    chunk = kind(
        id=header.id,
        object=name,
        created=header.created,
        model=header.model,
        system_fingerprint=SYSTEM_FINGERPRINT,
        choices=[choice],
        **told,
    )
    return [StreamEvent(chunk.to_json())]


def delta_chunk(
    header: Header, usage: dict[str, Any], index: int, delta: ChatDelta, logprobs: Any = None
) -> list[StreamEvent]:
    choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)
    return in_full(ChatCompletionChunk, "chat.completion.chunk", choice, header, usage)


def chat_chunk(
    header: Header, usage: dict[str, Any], index: int, text: str, logprobs: Any = None
) -> list[StreamEvent]:
    return delta_chunk(header, usage, index, ChatDelta(content=text), logprobs)


def completion_chunk(
    header: Header, usage: dict[str, Any], index: int, text: str, logprobs: Any = None
) -> list[StreamEvent]:
    choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None)
    return in_full(Completion, "text_completion", choice, header, usage)


def chat_stream(header: Header, **fields: Any) -> chat.ChatStream:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "m", "messages": messages, "n": CHOICES} | fields
    return chat.ChatStream(header, ChatCompletionRequest.model_validate(body))


def completion_stream(header: Header, **fields: Any) -> completions.CompletionStream:
    body = {"model": "m", "prompt": ["a", "b"], "n": CHOICES} | fields
    return completions.CompletionStream(header, CompletionRequest.model_validate(body), ())


@pytest.mark.parametrize("usage", USAGES, ids=["bare", "usage"])
@given(pieces=TEXTS, name=st.sampled_from(NAMES) | NASTY)
def test_any_text_is_written_as_its_model_writes_it(
    usage: dict[str, Any], pieces: list[tuple[int, str]], name: str
) -> None:
    header = replace(HEADER, model=name)
    chats, texts = chat_stream(header, **usage), completion_stream(header, **usage)
    for index, text in pieces:
        delta = TextDelta(index, text)
        assert chats.feed(0, delta) == chat_chunk(header, usage, index, text)
        for prompt in (0, 1):
            number = prompt * CHOICES + index
            assert texts.feed(prompt, delta) == completion_chunk(header, usage, number, text)


@pytest.mark.parametrize("usage", USAGES, ids=["bare", "usage"])
@given(pieces=TEXTS, call=st.integers(0, 300))
def test_any_thought_or_argument_is_written_as_its_model_writes_it(
    usage: dict[str, Any], pieces: list[tuple[int, str]], call: int
) -> None:
    chats = chat_stream(HEADER, **usage)
    for index, text in pieces:
        thought = ChatDelta(reasoning_content=text)
        assert chats.feed(0, ReasoningDelta(index, text)) == delta_chunk(
            HEADER, usage, index, thought
        )
        added = CallDelta(index=call, function=FunctionDelta(arguments=text))
        assert chats.feed(0, ToolCallDelta(index, call, text)) == delta_chunk(
            HEADER, usage, index, ChatDelta(tool_calls=[added])
        )


def test_log_probabilities_are_written_between_texts_that_have_none() -> None:
    entry = TokenLogprob("b", b"b", -0.5, (), 1)
    chats, texts = chat_stream(HEADER, logprobs=True), completion_stream(HEADER, logprobs=0)
    for delta in (TextDelta(0, "a"), TextDelta(0, "b", (entry,)), TextDelta(0, "c")):
        scored = list(delta.logprobs)
        told = chat_logprobs(scored) if scored else None
        assert chats.feed(0, delta) == chat_chunk(HEADER, {}, 0, delta.text, told)
        columns = text_logprobs(scored, 0) if scored else None
        assert texts.feed(0, delta) == completion_chunk(HEADER, {}, 0, delta.text, columns)
