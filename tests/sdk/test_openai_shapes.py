"""Every body on the wire has the shape that the OpenAI SDK's own models describe, strictly.

The SDK builds its objects without checking them; here they are validated, and nothing may be
missing that OpenAI's description requires, be it null, nor be there that it does not know.
"""

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai.types import Completion, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from tests.sdk.conftest import MODEL

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 3,
}
ONE: dict[str, Any] = {"model": MODEL, "prompt": "One, two,", "max_tokens": 3}
TOOLS: dict[str, Any] = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 8}},
                    "required": ["city"],
                },
            },
        }
    ],
    "tool_choice": "required",
    "max_tokens": 64,
}
HEADER = {"id", "object", "created", "model", "choices"}
TOKEN = {"token", "logprob", "bytes"}
CONTENT = "choices.logprobs.content"

REQUIRED: dict[type[BaseModel], dict[str, set[str]]] = {
    ChatCompletion: {
        "": HEADER | {"usage"},
        "choices": {"index", "message", "logprobs", "finish_reason"},
        "choices.message": {"role", "content", "refusal"},
        "choices.logprobs": {"content", "refusal"},
        CONTENT: TOKEN | {"top_logprobs"},
        f"{CONTENT}.top_logprobs": TOKEN,
    },
    ChatCompletionChunk: {
        "": HEADER,
        "choices": {"index", "delta", "logprobs", "finish_reason"},
        "choices.logprobs": {"content", "refusal"},
        CONTENT: TOKEN | {"top_logprobs"},
        f"{CONTENT}.top_logprobs": TOKEN,
    },
    Completion: {
        "": HEADER,
        "choices": {"index", "text", "logprobs", "finish_reason"},
        "choices.logprobs": {"tokens", "token_logprobs", "top_logprobs", "text_offset"},
    },
    Model: {"": {"id", "object", "created", "owned_by"}},
    ErrorObject: {"": {"message", "type", "param", "code"}},
}
"""Keys that OpenAI's description requires, by where they stand. The SDK's models hold most of those
that can be null for optional."""


def check(shape: type[BaseModel], body: Any) -> None:
    """Fail unless `body` is of that shape, to the type of every field."""
    validated = TypeAdapter(shape).validate_python(body, strict=True)
    assert list(unknown_keys(validated)) == []
    for place, keys in REQUIRED[shape].items():
        for found in standing_at(body, place.split(".") if place else []):
            assert keys <= found.keys(), f"{keys - found.keys()} missing from {place or 'the body'}"
    if usage := getattr(validated, "usage", None):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def unknown_keys(value: Any) -> list[str]:
    """The keys in a validated object that its model does not declare.

    Thinking has no key of OpenAI's in chats.
    """
    if isinstance(value, list):
        return [key for one in value for key in unknown_keys(one)]
    if not isinstance(value, BaseModel):
        return []
    declared = [getattr(value, name) for name in type(value).model_fields]
    extra = (value.model_extra or {}).keys() - {"reasoning_content"}
    return [*extra, *unknown_keys(declared)]


def standing_at(body: Any, place: list[str]) -> list[dict[str, Any]]:
    """All objects of `body` under these keys, through lists; null has nothing under it."""
    if body is None:
        return []
    if isinstance(body, list):
        return [found for one in body for found in standing_at(one, place)]
    return standing_at(body.get(place[0]), place[1:]) if place else [body]


def without_open_nulls(chunk: dict[str, Any]) -> dict[str, Any]:
    """A completion's chunk with the nulls filled in that the SDK does not expect, but OpenAI sends.

    The SDK has one model for whole completions and for chunks, which have yet to finish.
    """
    choices = [
        choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]
    ]
    return chunk | {"choices": choices}


async def whole(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


async def streamed(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The chunks of a stream, which must be well formed down to the bytes."""
    answer = await http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    *events, last, nothing = answer.text.split("\n\n")
    # A slow machine pings through its silences.
    events = [event for event in events if not event.startswith(": ping")]
    assert last == "data: [DONE]"
    assert nothing == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"n": 2}, id="two choices"),
        pytest.param({"logprobs": True}, id="scores"),
        pytest.param({"logprobs": True, "top_logprobs": 2}, id="scores and alternatives"),
        pytest.param({"stop": "e", "temperature": 0}, id="stopped"),
    ],
)
async def test_chat_completions_and_their_chunks(
    http: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    body, chunks = await asyncio.gather(
        whole(http, CHAT, HELLO | options), streamed(http, CHAT, HELLO | options)
    )
    check(ChatCompletion, body)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    for choice in body["choices"]:
        assert choice["message"]["refusal"] is None
        assert (choice["logprobs"] is not None) == ("logprobs" in options)
    for chunk in chunks:
        check(ChatCompletionChunk, chunk)
        assert "usage" not in chunk
    # Every choice begins with its role and ends with its reason, and says nothing else there.
    for index in range(options.get("n", 1)):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert all(choice["finish_reason"] is None for choice in mine[:-1])
        assert mine[-1]["finish_reason"] in ("stop", "length")


async def test_tool_calls_and_their_chunks(http: httpx.AsyncClient) -> None:
    asked = HELLO | TOOLS | {"parallel_tool_calls": False}
    body, chunks = await asyncio.gather(whole(http, CHAT, asked), streamed(http, CHAT, asked))
    check(ChatCompletion, body)
    (choice,) = body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call.keys() == {"id", "type", "function"}
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    for chunk in chunks:
        check(ChatCompletionChunk, chunk)
    first, second, *others, last = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert first == {"role": "assistant", "content": None}
    (opening,) = second["tool_calls"]
    assert opening.keys() == {"index", "id", "type", "function"}
    assert opening["function"] == {"name": "weather", "arguments": ""}
    assert last == {}
    pieces = [delta["tool_calls"][0] for delta in others]
    assert all(piece.keys() == {"index", "function"} for piece in pieces)
    json.loads("".join(piece["function"]["arguments"] for piece in pieces))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"n": 2, "prompt": ["One,", "Two,"]}, id="two prompts, two choices"),
        pytest.param({"logprobs": 2}, id="scores"),
        pytest.param({"logprobs": 0}, id="scores without alternatives"),
        pytest.param({"echo": True}, id="echo"),
    ],
)
async def test_completions_and_their_chunks(
    http: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    body, chunks = await asyncio.gather(
        whole(http, TEXT, ONE | options), streamed(http, TEXT, ONE | options)
    )
    check(Completion, body)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert "usage" in body
    for choice in body["choices"]:
        assert (choice["logprobs"] is not None) == ("logprobs" in options)
    for chunk in chunks:
        check(Completion, without_open_nulls(chunk))
        assert "usage" not in chunk


async def test_the_first_token_of_an_echoed_prompt_has_null_for_a_score(
    http: httpx.AsyncClient,
) -> None:
    body = await whole(http, TEXT, ONE | {"echo": True, "logprobs": 1, "max_tokens": 0})
    logprobs = body["choices"][0]["logprobs"]
    for column in ("token_logprobs", "top_logprobs"):
        assert logprobs[column].pop(0) is None
    # The SDK does not expect that null, but OpenAI sends it. All else is as described.
    check(Completion, body)


@pytest.mark.parametrize(
    ("path", "request_body", "shape"), [(CHAT, HELLO, ChatCompletionChunk), (TEXT, ONE, Completion)]
)
async def test_usage_that_was_asked_for_is_null_in_every_chunk_but_the_last(
    http: httpx.AsyncClient, path: str, request_body: dict[str, Any], shape: type[BaseModel]
) -> None:
    asked = request_body | {"stream_options": {"include_usage": True}}
    *chunks, last = await streamed(http, path, asked)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    cached = last["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= cached < last["usage"]["prompt_tokens"]
    check(shape, last)
    for chunk in chunks:
        check(shape, without_open_nulls(chunk) if shape is Completion else chunk)


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert MODEL in [model["id"] for model in listed["data"]]
    one = (await http.get(f"/v1/models/{MODEL}")).json()
    for model in [one, *listed["data"]]:
        described = {name: value for name, value in model.items() if name in Model.model_fields}
        check(Model, described)
        # What this server adds is its own, and no more than this.
        assert model.keys() - described.keys() == {
            "state",
            "size",
            "context_length",
            "model_type",
            "aliases",
            "default_sampling",
            "capabilities",
        }
        assert model["capabilities"].keys() == {
            "chat",
            "tools",
            "native_tools",
            "reasoning",
            "structured_output",
            "embeddings",
            "rerank",
        }


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        pytest.param(CHAT, HELLO | {"model": "no-such-model"}, 404, id="unknown model"),
        pytest.param(CHAT, HELLO | {"model": "none", "stream": True}, 404, id="streamed"),
        pytest.param(CHAT, HELLO | {"temperature": "hot"}, 400, id="wrong type"),
        pytest.param(CHAT, {"model": MODEL}, 400, id="missing field"),
        pytest.param(TEXT, ONE | {"prompt": [1] * 10_000}, 400, id="too long"),
        pytest.param(CHAT, HELLO | {"tool_choice": "required"}, 400, id="no tool"),
        pytest.param(CHAT, HELLO | {"guided_regex": "("}, 400, id="no expression"),
        pytest.param("/v1/nowhere", {}, 404, id="unknown path"),
        pytest.param("/v1/models", {}, 405, id="wrong method"),
    ],
)
async def test_errors(http: httpx.AsyncClient, path: str, body: Any, status: int) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    check(ErrorObject, answer.json()["error"])


async def test_the_error_for_a_wrong_key(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    check(ErrorObject, answer.json()["error"])
    assert answer.json()["error"]["code"] == "invalid_api_key"
