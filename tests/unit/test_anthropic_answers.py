"""Anthropic's answers and streams, from internal events."""

import json
from datetime import UTC, datetime
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message

from mlx_server.api.anthropic.answering import Answering
from mlx_server.api.anthropic.answers import MessageAnswer
from mlx_server.api.anthropic.signatures import digest, held, holding
from mlx_server.api.anthropic.streams import MessageStream
from mlx_server.api.anthropic.wire import WIRE, error_body, error_event
from mlx_server.api.generation import Accepted
from mlx_server.api.http.limits import Window
from mlx_server.api.http.wire import Failure
from mlx_server.schemas.internal import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from tests.support.anthropic import HELLO, Events, alike, request

USAGE = Usage(prompt_tokens=50, completion_tokens=20, cached_tokens=32, reasoning_tokens=4)
THOUGHT: list[Event] = [ReasoningDelta(0, "Let me "), ReasoningDelta(0, "see.")]
CALLS: list[Event] = [
    *THOUGHT,
    TextDelta(0, "I look."),
    ToolCallStart(0, 0, "call_1", "weather"),
    ToolCallDelta(0, 0, '{"city": '),
    ToolCallDelta(0, 0, '"Rome"}'),
    ToolCallStart(0, 1, "call_2", "clock"),
    Finished(0, "tool_calls", USAGE),
]


def answered(events: list[Event], marked: bool = False, **fields: Any) -> Message:
    """The answer, which is the same whole and streamed."""
    answering = Answering(Accepted("m", prompt_tokens=50), request(**fields), marked)
    answer, stream, read = MessageAnswer(answering), MessageStream(answering), Events()
    written = list(stream.begin())
    for event in events:
        answer.feed(0, event)
        written += stream.feed(0, event)
    for event in [*written, *stream.end(USAGE)]:
        read.take(event.name, json.loads(event.data))
    whole = Message.model_validate_json(answer.body(USAGE), strict=True)
    assert alike(read.message) == alike(whole)
    assert read.message.usage == whole.usage
    return whole


def test_blocks_come_in_the_order_of_what_was_said() -> None:
    thinking, text, weather, clock = answered(CALLS).content
    assert thinking.type == "thinking"
    assert (thinking.thinking, thinking.signature) == ("Let me see.", digest("Let me see."))
    assert text.type == "text"
    assert text.text == "I look."
    assert weather.type == clock.type == "tool_use"
    assert (weather.id, weather.name, weather.input) == ("toolu_1", "weather", {"city": "Rome"})
    assert (clock.id, clock.name, clock.input) == ("toolu_2", "clock", {})


def test_text_behind_calls_and_thoughts_opens_a_block_again() -> None:
    events = [*CALLS[:-1], *THOUGHT, TextDelta(0, "So."), CALLS[-1]]
    kinds = [block.type for block in answered(events).content]
    assert kinds == ["thinking", "text", "tool_use", "tool_use", "thinking", "text"]


def test_an_answer_without_a_word_has_no_blocks() -> None:
    assert answered([Finished(0, "stop", USAGE)]).content == []


@pytest.mark.parametrize(
    ("finished", "limit", "reason", "stop"),
    [
        (Finished(0, "stop", USAGE), 20, "end_turn", None),
        (Finished(0, "stop", USAGE, "###"), 20, "stop_sequence", "###"),
        (Finished(0, "tool_calls", USAGE), 20, "tool_use", None),
        (Finished(0, "length", USAGE), 20, "max_tokens", None),
        (Finished(0, "length", USAGE), 21, "model_context_window_exceeded", None),
    ],
    ids=str,
)
def test_an_answer_says_why_it_ended(
    finished: Finished, limit: int, reason: str, stop: str | None
) -> None:
    message = answered([TextDelta(0, "Hi"), finished], max_tokens=limit)
    assert (message.stop_reason, message.stop_sequence) == (reason, stop)


def test_a_prompts_tokens_are_told_apart_by_where_they_came_from() -> None:
    usage = answered(CALLS).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (18, 32)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 20)
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == 4
    marked = answered(CALLS, marked=True).usage
    assert (marked.input_tokens, marked.cache_creation_input_tokens) == (1, 17)


def test_thinking_that_shall_not_be_shown_is_in_its_signature() -> None:
    thinking = answered(CALLS, thinking={"type": "adaptive", "display": "omitted"}).content[0]
    assert thinking.type == "thinking"
    assert (thinking.thinking, held(thinking.signature)) == ("", "Let me see.")
    assert held(holding("größer")) == "größer"


def test_who_asked_for_no_thinking_gets_none() -> None:
    kinds = [block.type for block in answered(CALLS, thinking={"type": "disabled"}).content]
    assert kinds == ["text", "tool_use", "tool_use"]


def test_a_call_that_a_limit_cut_off_is_told_as_far_as_it_came() -> None:
    answering = Answering(Accepted("m"), request(max_tokens=20), False)
    answer = MessageAnswer(answering)
    for event in (CALLS[3], ToolCallDelta(0, 0, '{"a": 1, "city": "Ro')):
        answer.feed(0, event)
    answer.feed(0, Finished(0, "length", USAGE))
    (call,) = Message.model_validate_json(answer.body(USAGE)).content
    assert call.type == "tool_use"
    assert call.input == {"a": 1, "city": "Ro"}


def test_context_management_is_answered_by_no_edits() -> None:
    answering = Answering(Accepted("m"), request(context_management={"edits": []}), False)
    answer, stream = MessageAnswer(answering), MessageStream(answering)
    finished = Finished(0, "stop", USAGE)
    answer.feed(0, finished)
    stream.feed(0, finished)
    none = {"applied_edits": []}
    assert json.loads(answer.body(USAGE))["context_management"] == none
    assert json.loads(stream.end(USAGE)[0].data)["context_management"] == none


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_every_status_has_its_kind_of_error(status: int, kind: str) -> None:
    failure = Failure(status, "any", "a_code", "No.", None, "req_1")
    assert json.loads(error_body(failure)) == {
        "type": "error",
        "error": {"type": kind, "message": "No.", "details": {"error_code": "a_code"}},
        "request_id": "req_1",
    }


def test_an_error_in_a_stream_is_raised_by_the_sdk() -> None:
    """Ours, in the middle of what the SDK reads."""
    stream = MessageStream(Answering(Accepted("m"), request(), marked=False))
    failure = Failure(503, "any", "engine_failed", "The engine ended.", None, "req_1")
    events = [*stream.begin(), *stream.feed(0, CALLS[2]), error_event(failure)]
    sent = b"".join(WIRE.frame(one, number) for number, one in enumerate(events))
    transport = httpx2.MockTransport(
        lambda asked: httpx2.Response(
            200, content=sent, headers={"content-type": WIRE.media_type, "request-id": "req_1"}
        )
    )
    with anthropic.Anthropic(
        api_key="a", max_retries=0, http_client=anthropic.DefaultHttpxClient(transport=transport)
    ) as client:
        asked: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": HELLO}
        with client.messages.stream(**asked) as read, pytest.raises(anthropic.APIError) as raised:
            read.until_done()
    assert "The engine ended." in str(raised.value)
    assert raised.value.body == json.loads(error_body(failure))


def test_rate_limits_are_told_as_anthropic_does() -> None:
    window = Window(limit=10, before=0, left_of_before=0.0, now=4, left_of_now=30.0)
    headers = {name.decode(): value.decode() for name, value in WIRE.rate_headers("tokens", window)}
    reset = datetime.fromisoformat(headers.pop("anthropic-ratelimit-tokens-reset"))
    assert 80 < (reset - datetime.now(UTC)).total_seconds() <= 90
    assert headers == {
        "anthropic-ratelimit-tokens-limit": "10",
        "anthropic-ratelimit-tokens-remaining": "6",
    }
    assert headers.keys() < set(WIRE.exposed_headers)
