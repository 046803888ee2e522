"""OpenAI's wire formats: what is accepted, what it means, and how answers are written."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_server.api.errors import invalid_request
from mlx_server.api.v1 import chat, completions
from mlx_server.api.v1.generation import Header, Tally
from mlx_server.config import Settings
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import (
    Alternative,
    Caller,
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Usage,
)
from mlx_server.schemas.openai.chat import UNSUPPORTED, ChatCompletionRequest, chat_logprobs
from mlx_server.schemas.openai.completions import CompletionRequest, text_logprobs
from mlx_server.telemetry import Metrics, RequestTimer

HELLO = [{"role": "user", "content": "Hello"}]
CALLER = Caller("req_1")
HEADER = Header("chatcmpl-1", 1700000000, "m")


def chat_request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": HELLO} | fields)


def completion_request(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "Hello"} | fields)


def translated(**fields: Any) -> InferenceRequest:
    return chat.to_inference(chat_request(**fields), CALLER, Settings())


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        (90, 90.0),
        (0, 0.0),
        (0.5, 0.5),
        ("90", 90.0),
        ("90s", 90.0),
        ("5m", 300.0),
        (" 1.5 h ", 5400.0),
        (-1, -1.0),
        (-0.5, -1.0),
        ("-1", -1.0),
        (None, None),
    ],
)
def test_keep_alive_is_a_number_of_seconds_or_a_duration(
    keep_alive: object, seconds: float | None
) -> None:
    assert translated(keep_alive=keep_alive).keep_alive == seconds
    body = completion_request(keep_alive=keep_alive)
    (request,) = completions.to_inference(body, CALLER, Settings())
    assert request.keep_alive == seconds


@pytest.mark.parametrize(
    "keep_alive", ["", "soon", "-5m", "5 weeks", "1e3", "inf", "٣m", "9" * 400, 10**400, True, [5]]
)
def test_a_keep_alive_that_is_no_duration_is_refused(keep_alive: object) -> None:
    with pytest.raises(ValidationError):
        chat_request(keep_alive=keep_alive)


def test_priority_is_passed_on() -> None:
    assert translated().priority == 0
    assert translated(priority=-3).priority == -3
    (request,) = completions.to_inference(completion_request(priority=7), CALLER, Settings())
    assert request.priority == 7


def messages_of(*messages: dict[str, Any]) -> ChatPrompt:
    prompt = translated(messages=list(messages)).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


def chunks_of(stream: bytes) -> list[dict[str, Any]]:
    lines = [line for line in stream.decode().split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# requests


def test_defaults_are_openais() -> None:
    request = translated()
    assert request.sampling.temperature == 1.0
    assert request.sampling.top_p == 1.0
    assert (request.n, request.seed, request.max_tokens, request.stop) == (1, None, None, ())
    assert request.logprobs is None
    assert completion_request().max_tokens == 16


def test_max_completion_tokens_wins() -> None:
    assert translated(max_tokens=5).max_tokens == 5
    assert translated(max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_stop_is_a_string_or_a_list() -> None:
    assert translated(stop="end").stop == ("end",)
    assert translated(stop=["a", "b"]).stop == ("a", "b")
    assert translated(stop=[]).stop == ()


def test_logit_bias_keys_become_token_ids() -> None:
    assert translated(logit_bias={"50": -100, "7": 0.5}).sampling.logit_bias == {50: -100, 7: 0.5}


def test_unlimited_top_k_is_0_or_minus_1() -> None:
    assert translated(top_k=-1).sampling.top_k == translated(top_k=0).sampling.top_k == 0


def test_top_p_0_takes_the_likeliest_token() -> None:
    sampling = translated(top_p=0, temperature=1.5).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_every_seed_of_64_bits_is_taken() -> None:
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert translated(seed=seed).seed == seed


def test_asking_for_logprobs_alone_reports_no_alternatives() -> None:
    assert translated(logprobs=True).logprobs == 0
    assert translated(logprobs=True, top_logprobs=4).logprobs == 4


def test_more_choices_than_the_owner_allows_are_refused() -> None:
    body = chat_request(n=3)
    assert chat.to_inference(body, CALLER, Settings(max_choices=3)).n == 3
    with pytest.raises(BadRequest) as refused:
        chat.to_inference(body, CALLER, Settings(max_choices=2))
    assert refused.value.param == "n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        chat_request(temperature=value)


def test_developer_means_system() -> None:
    prompt = messages_of({"role": "developer", "content": "Be brief."}, HELLO[0])
    assert prompt.messages[0] == {"role": "system", "content": "Be brief."}


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert messages_of({"role": "user", "content": parts}).messages[0]["content"] == "one\ntwo"


def test_a_last_assistant_message_is_continued() -> None:
    opening = {"role": "assistant", "content": "The answer is"}
    assert messages_of(HELLO[0], opening).continue_final
    assert not messages_of(HELLO[0], opening, HELLO[0]).continue_final


def test_an_empty_last_assistant_message_is_no_beginning() -> None:
    prompt = messages_of(HELLO[0], {"role": "assistant", "content": ""})
    assert not prompt.continue_final
    assert [message["role"] for message in prompt.messages] == ["user"]


def test_a_tool_round_trip_reaches_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    prompt = messages_of(
        HELLO[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    )
    assistant, result = prompt.messages[1:]
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "content": "42", "tool_call_id": "c1"}


def test_arguments_that_are_no_object_stay_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{oops"}}
    prompt = messages_of(HELLO[0], {"role": "assistant", "tool_calls": [call]}, HELLO[0])
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == "{oops"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat_request(**{name: {"some": "thing"}})
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"audio": None, "functions": None},
    ],
    ids=str,
)
def test_unsupported_fields_that_ask_for_nothing_pass(fields: dict[str, Any]) -> None:
    assert chat_request(**fields).model == "m"


def test_best_of_must_equal_n() -> None:
    assert completion_request(best_of=1, suffix="").n == 1
    assert completion_request(best_of=2, n=2).n == 2
    with pytest.raises(BadRequest, match="best_of"):
        completion_request(best_of=2)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt([1, 2])]),
        ([[1], [2, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, wanted: list[Any]) -> None:
    body = completion_request(prompt=prompt)
    requests = completions.to_inference(body, CALLER, Settings())
    assert [request.prompt for request in requests] == wanted


def test_echo_asks_for_the_prompts_scores_only_where_they_are_needed() -> None:
    def asked(**fields: Any) -> int | None:
        return completions.to_inference(completion_request(**fields), CALLER, Settings())[
            0
        ].prompt_logprobs

    assert asked() is None
    assert asked(logprobs=3) is None
    assert asked(echo=True) is None
    assert asked(echo=True, logprobs=3) == 3


def test_the_branch_of_a_union_that_was_meant_is_named() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    with pytest.raises(ValidationError) as invalid:
        ChatCompletionRequest.model_validate(body)
    error = invalid_request(invalid.value.errors(), body)
    assert error.param == "messages.0.content.0"
    assert "text only" in error.message


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    body = {"model": "m", "messages": HELLO, "temperature": "secret " * 1000}
    with pytest.raises(ValidationError) as invalid:
        ChatCompletionRequest.model_validate(body)
    error = invalid_request(invalid.value.errors(), body)
    assert "secret" not in error.message


# answers

USAGE = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=3)


def scored(token: str, logprob: float | None, offset: int, *top: tuple[str, float]) -> TokenLogprob:
    others = tuple(Alternative(text, text.encode(), value) for text, value in top)
    return TokenLogprob(token, token.encode(), logprob, others, offset)


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
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert body["object"] == "chat.completion"


def test_a_chat_stream_opens_with_the_role_and_closes_with_the_reason() -> None:
    stream = chat.ChatStream(HEADER, chat_request())
    text = stream.feed(0, TextDelta(0, "Hi"))
    chunks = chunks_of(stream.begin() + text + stream.feed(0, Finished(0, "length", USAGE)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert stream.end(USAGE) == b""


def test_usage_is_null_until_the_last_chunk_when_it_was_asked_for() -> None:
    stream = chat.ChatStream(HEADER, chat_request(stream_options={"include_usage": True}))
    *chunks, last = chunks_of(
        stream.begin() + stream.feed(0, Finished(0, "stop", USAGE)) + stream.end(USAGE)
    )
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7


def test_every_choice_of_a_stream_opens() -> None:
    chunks = chunks_of(chat.ChatStream(HEADER, chat_request(n=3)).begin())
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 2]


def test_text_with_line_ends_stays_one_event() -> None:
    stream = chat.ChatStream(HEADER, chat_request())
    data = stream.feed(0, TextDelta(0, "a\n\nb\r\nc\u2028d"))
    assert data.count(b"\n") == 2
    assert chunks_of(data)[0]["choices"][0]["delta"]["content"] == "a\n\nb\r\nc\u2028d"


def test_minus_infinity_is_written_as_a_number() -> None:
    told = chat_logprobs([scored("a", -math.inf, 0, ("b", -0.5))])
    assert json.loads(told.to_json()) == {
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
    told = text_logprobs([scored("a", -2.0, 3, ("b", -0.5), ("b", -1.5))], start=10)
    assert told.top_logprobs == [{"b": -0.5, "a": -2.0}]
    assert told.text_offset == [13]


def test_choices_are_numbered_prompt_by_prompt() -> None:
    body = completion_request(prompt=["x", "y"], n=2)
    answer = completions.CompletionAnswer(HEADER, body)
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


def test_the_prompt_of_several_choices_counts_once() -> None:
    tally = Tally(RequestTimer(Metrics()))
    for prompt, choice, cached in ((0, 0, 0), (0, 1, 5), (1, 0, 4)):
        tally.feed(prompt, Finished(choice, "stop", Usage(5, 2, cached)))
    assert tally.finish() == Usage(prompt_tokens=10, completion_tokens=6, cached_tokens=4)


def test_echo_puts_the_prompt_and_its_scores_in_front() -> None:
    body = completion_request(prompt="ab", echo=True, logprobs=1)
    header = replace(HEADER, prompts=("ab",))
    events: list[Event] = [
        PromptScored((scored("a", None, 0), scored("b", -1.0, 1, ("c", -0.1)))),
        TextDelta(0, "c", (scored("c", -0.2, 0),)),
        Finished(0, "length", USAGE),
    ]
    answer = completions.CompletionAnswer(header, body)
    stream = completions.CompletionStream(header, body)
    streamed = stream.begin()
    for event in events:
        answer.feed(0, event)
        streamed += stream.feed(0, event)
    (choice,) = json.loads(answer.body(USAGE))["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -0.2],
        "top_logprobs": [None, {"c": -0.1, "b": -1.0}, {"c": -0.2}],
        "text_offset": [0, 1, 2],
    }
    pieces = [chunk["choices"][0] for chunk in chunks_of(streamed)]
    assert "".join(piece["text"] for piece in pieces) == "abc"
    offsets = [piece["logprobs"]["text_offset"] for piece in pieces if piece["logprobs"]]
    assert offsets == [[0, 1], [2]]


def test_echo_of_token_ids_shows_their_text() -> None:
    header = replace(HEADER, prompts=("é", "f"))
    stream = completions.CompletionStream(header, completion_request(prompt=[[1], [2]], echo=True))
    pieces = [chunk["choices"][0] for chunk in chunks_of(stream.begin())]
    assert [(piece["index"], piece["text"]) for piece in pieces] == [(0, "é"), (1, "f")]
