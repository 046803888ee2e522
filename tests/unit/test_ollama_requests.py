"""Ollama's requests as internal ones, and what its streams say through silences."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_server.api.http.streaming import _Frames
from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.ollama.description import human, quantization
from mlx_server.api.ollama.prompts import chat_inference, generate_inference
from mlx_server.api.ollama.wire import WIRE
from mlx_server.config import Settings
from mlx_server.schemas.internal import Caller, ChatPrompt, InferenceRequest
from mlx_server.schemas.ollama.chat import ChatRequest, GenerateRequest

CALLER = Caller("r")
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> InferenceRequest:
    return chat_inference(ChatRequest.model_validate({"messages": HELLO, **fields}), CALLER)


def prompt_of(request: InferenceRequest) -> ChatPrompt:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt


def test_what_is_left_out_is_ollamas_default_and_left_to_the_model() -> None:
    request = chat(
        options={"repeat_penalty": 1.1, "seed": -1, "num_predict": -2, "stop": ["", "a"]}
    )
    assert (request.sampling.temperature, request.sampling.top_k) == (0.8, 40)
    assert request.sampling.repetition_penalty == 1.1
    assert request.unasked == {"temperature", "top_p", "top_k", "min_p"}
    assert (request.seed, request.max_tokens, request.stop) == (None, None, ("a",))
    greedy = chat(options={"temperature": 0})
    assert (greedy.sampling.temperature, greedy.sampling.top_p) == (0, 1)
    assert greedy.unasked == {"top_k", "min_p", "repetition_penalty"}


@pytest.mark.parametrize(
    ("think", "variables"),
    [
        (None, {}),
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False, "reasoning_effort": "none"}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_thinking_is_told_to_the_template(think: Any, variables: dict[str, Any]) -> None:
    assert prompt_of(chat(think=think)).template_kwargs == variables
    body = GenerateRequest(prompt="Hello", think=think)
    assert prompt_of(generate_inference(body, CALLER)).template_kwargs == variables


def test_results_find_their_calls_though_clients_drop_the_ids() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b", "a")]
    results = [{"role": "TOOL", "content": "x", "tool_name": name} for name in ("b", "a", "a", "z")]
    turn = {"role": "assistant", "thinking": "hm", "tool_calls": calls}
    written = prompt_of(chat(messages=[*HELLO, turn, *results])).messages
    assert written[1]["reasoning_content"] == "hm"
    ids = [call["id"] for call in written[1]["tool_calls"]]
    assert len(set(ids)) == 3
    answered = [message["tool_call_id"] for message in written[2:]]
    assert answered[:3] == [ids[1], ids[0], ids[2]]
    assert answered[3] not in ids
    assert [message["name"] for message in written[2:]] == ["b", "a", "a", "z"]
    own = [{**calls[0], "id": "mine"}, {**calls[0], "id": "yours"}]
    named = {"role": "tool", "content": "x", "tool_name": "a", "tool_call_id": "yours"}
    written = prompt_of(chat(messages=[*HELLO, {**turn, "tool_calls": own}, named])).messages
    assert written[2]["tool_call_id"] == "yours"


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    begun = prompt_of(chat(messages=[*HELLO, {"role": "assistant", "content": "It"}]))
    assert begun.continue_final
    empty = prompt_of(chat(messages=[*HELLO, {"role": "assistant", "content": ""}]))
    assert (empty.continue_final, len(empty.messages)) == (False, 1)


def test_a_silent_stream_of_lines_is_kept_open_by_events_without_text() -> None:
    settings = Settings(ping_interval=7)
    app = SimpleNamespace(state=SimpleNamespace(settings=settings))
    scope: Any = {"state": {"wire": WIRE, "request_id": "r"}, "app": app}
    frames = _Frames(scope, lambda: StreamEvent(b'{"done":false}'))
    assert frames.ping_interval == 7
    assert json.loads(frames.ping()) == {"done": False}
    assert frames.ping().endswith(b"\n")
    assert _Frames(scope, None).ping_interval == 0


def test_sizes_and_formats_have_ollamas_words() -> None:
    assert [human(n) for n in (7_600_000_000, 494_000_000, 12_345, 9)] == [
        *("7.6B", "494.0M", "12.3K", "9")
    ]
    assert quantization({"quantization": {"bits": 4, "group_size": 64}}) == "int4"
    assert quantization({"quantization": {"bits": 4, "mode": "mxfp4"}}) == "mxfp4"
    assert quantization({"torch_dtype": "bfloat16"}) == "BF16"
    assert quantization({}) == "unknown"
