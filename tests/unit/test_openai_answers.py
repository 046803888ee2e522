"""OpenAI's answers and streams, from internal events."""

import json
import math
from collections.abc import Sequence
from typing import Any

from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.openai import chat, completions
from mlx_server.api.openai.chunks import Header
from mlx_server.api.openai.logprobs import chat_logprobs, text_logprobs
from mlx_server.schemas.internal import (
    Alternative,
    Event,
    Finished,
    PromptScored,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.schemas.openai.chat import ChatCompletionRequest
from tests.support.openai import TOOLS, WEATHER, chat_request, completion_request

HEADER = Header("chatcmpl-1", 1700000000, "m")
USAGE = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=3)
CALLS: list[Event] = [
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "see."),
    ToolCallStart(0, 0, "c1", "weather"),
    ToolCallDelta(0, 0, '{"city": '),
    ToolCallDelta(0, 0, '"Rome"}'),
    ToolCallStart(0, 1, "c2", "clock"),
    ToolCallDelta(0, 1, "{}"),
    Finished(0, "tool_calls", USAGE),
]


def chunks_of(*events: Sequence[StreamEvent]) -> list[dict[str, Any]]:
    return [json.loads(event.data) for together in events for event in together]


def scored(token: str, logprob: float | None, offset: int, *top: tuple[str, float]) -> TokenLogprob:
    others = tuple(Alternative(text, text.encode(), value) for text, value in top)
    return TokenLogprob(token, token.encode(), logprob, others, offset)


def answered(body: ChatCompletionRequest, events: list[Event]) -> dict[str, Any]:
    """The only choice of the whole answer."""
    answer = chat.ChatAnswer(HEADER, body)
    for event in events:
        answer.feed(0, event)
    choice: dict[str, Any] = json.loads(answer.body(USAGE))["choices"][0]
    return choice


def streamed(body: ChatCompletionRequest, events: list[Event]) -> list[dict[str, Any]]:
    """The deltas of the only choice."""
    stream = chat.ChatStream(HEADER, body)
    chunks = chunks_of(stream.begin(), *(stream.feed(0, event) for event in events))
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def test_a_chat_answer_has_its_required_keys_when_they_are_null() -> None:
    answer = chat.ChatAnswer(HEADER, chat_request())
    answer.feed(0, TextDelta(0, "Hel"))
    answer.feed(0, TextDelta(0, "lo"))
    answer.feed(0, Finished(0, "stop", USAGE))
    body = json.loads(answer.body(USAGE))
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    assert body["object"] == "chat.completion"


def test_an_answer_that_only_calls_tools_has_no_content() -> None:
    choice = answered(chat_request(tools=TOOLS), CALLS)
    weather = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Let me see.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": weather},
            {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
        ],
    }
    assert choice["finish_reason"] == "tool_calls"


def test_text_before_a_call_is_kept() -> None:
    choice = answered(chat_request(tools=TOOLS), [TextDelta(0, "Sure: "), *CALLS])
    assert choice["message"]["content"] == "Sure: "
    assert len(choice["message"]["tool_calls"]) == 2


def test_calls_stream_their_names_first_and_then_their_arguments() -> None:
    weather, clock = {"name": "weather", "arguments": ""}, {"name": "clock", "arguments": ""}
    assert streamed(chat_request(tools=TOOLS), CALLS) == [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": weather}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": clock}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]


def test_who_asks_for_functions_is_answered_in_the_old_form() -> None:
    body = chat_request(functions=[WEATHER["function"]])
    events = [*CALLS[2:5], CALLS[-1]]
    choice = answered(body, events)
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choice["message"]["function_call"] == call
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "function_call"
    assert streamed(body, events) == [
        {"role": "assistant", "content": None},
        {"function_call": {"name": "weather", "arguments": ""}},
        {"function_call": {"arguments": '{"city": '}},
        {"function_call": {"arguments": '"Rome"}'}},
        {},
    ]


def test_a_chat_stream_opens_with_the_role_and_closes_with_the_reason() -> None:
    stream = chat.ChatStream(HEADER, chat_request())
    text = stream.feed(0, TextDelta(0, "Hi"))
    chunks = chunks_of(stream.begin(), text, stream.feed(0, Finished(0, "length", USAGE)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert stream.end(USAGE) == ()


def test_usage_is_null_until_the_last_chunk_when_it_was_asked_for() -> None:
    stream = chat.ChatStream(HEADER, chat_request(stream_options={"include_usage": True}))
    *chunks, last = chunks_of(
        stream.begin(), stream.feed(0, Finished(0, "stop", USAGE)), stream.end(USAGE)
    )
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7


def test_every_choice_of_a_stream_opens() -> None:
    chunks = chunks_of(chat.ChatStream(HEADER, chat_request(n=3)).begin())
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 2]


def test_text_with_line_ends_stays_one_line() -> None:
    stream = chat.ChatStream(HEADER, chat_request())
    [event] = stream.feed(0, TextDelta(0, "a\n\nb\r\nc\u2028d"))
    assert len(event.data.splitlines()) == 1
    assert chunks_of([event])[0]["choices"][0]["delta"]["content"] == "a\n\nb\r\nc\u2028d"


def test_minus_infinity_is_written_as_a_number() -> None:
    scores = chat_logprobs([scored("a", -math.inf, 0, ("b", -0.5))])
    assert json.loads(scores.to_json()) == {
        "content": [
            {
                "token": "a",
                "logprob": -9999.0,
                "bytes": [97],
                "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }


def test_a_completion_lists_the_token_among_its_alternatives() -> None:
    scores = text_logprobs([scored("a", -2.0, 3, ("b", -0.5), ("b", -1.5))], start=10)
    assert scores.top_logprobs == [{"b": -0.5, "a": -2.0}]
    assert scores.text_offset == [13]


def test_choices_are_numbered_prompt_by_prompt() -> None:
    body = completion_request(prompt=["x", "y"], n=2)
    answer = completions.CompletionAnswer(HEADER, body, ())
    for prompt, choice in ((1, 0), (0, 1), (0, 0), (1, 1)):
        answer.feed(prompt, TextDelta(choice, f"{prompt}{choice}"))
        answer.feed(prompt, Finished(choice, "length", USAGE))
    choices = json.loads(answer.body(USAGE))["choices"]
    assert [(one["index"], one["text"]) for one in choices] == [
        (0, "00"),
        (1, "01"),
        (2, "10"),
        (3, "11"),
    ]


def test_echo_puts_the_prompt_and_its_scores_in_front() -> None:
    body = completion_request(prompt="ab", echo=True, logprobs=1)
    events: list[Event] = [
        PromptScored((scored("a", None, 0), scored("b", -1.0, 1, ("c", -0.1)))),
        TextDelta(0, "c", (scored("c", -0.2, 0),)),
        Finished(0, "length", USAGE),
    ]
    answer = completions.CompletionAnswer(HEADER, body, ["ab"])
    stream = completions.CompletionStream(HEADER, body, ["ab"])
    streamed = [stream.begin()]
    for event in events:
        answer.feed(0, event)
        streamed.append(stream.feed(0, event))
    (choice,) = json.loads(answer.body(USAGE))["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -0.2],
        "top_logprobs": [None, {"c": -0.1, "b": -1.0}, {"c": -0.2}],
        "text_offset": [0, 1, 2],
    }
    pieces = [chunk["choices"][0] for chunk in chunks_of(*streamed)]
    assert "".join(piece["text"] for piece in pieces) == "abc"
    offsets = [piece["logprobs"]["text_offset"] for piece in pieces if piece["logprobs"]]
    assert offsets == [[0, 1], [2]]


def test_echo_of_token_ids_shows_their_text() -> None:
    body = completion_request(prompt=[[1], [2]], echo=True)
    stream = completions.CompletionStream(HEADER, body, ["é", "f"])
    pieces = [chunk["choices"][0] for chunk in chunks_of(stream.begin())]
    assert [(piece["index"], piece["text"]) for piece in pieces] == [(0, "é"), (1, "f")]


def test_a_chunk_that_keeps_a_stream_open_says_nothing() -> None:
    spoken = chat.ChatStream(HEADER, chat_request(n=2))
    written = completions.CompletionStream(HEADER, completion_request(), [])
    [said] = chunks_of([spoken.idle()])
    assert said["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]
    [said] = chunks_of([written.idle()])
    assert said["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": None}]
