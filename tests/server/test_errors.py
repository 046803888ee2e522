"""Requests that cannot be honoured get a 4xx in OpenAI's shape, and harm nobody."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import CONTEXT, MODEL
from tests.support.server import CHAT, HELLO, TEXT, Server

PICTURE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}


@pytest.fixture(autouse=True)
def still_serving(server: Server, client: httpx.Client) -> Iterator[None]:
    """After each of these requests a good one is answered, by the same engine."""
    engines = {engine.pid for engine in server.engines()}
    yield
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert {engine.pid for engine in server.engines()} == engines


def assert_refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The answer is an error of that status in OpenAI's shape; returns the error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) <= 500
    assert "Traceback" not in answer.text
    assert len(answer.content) < 2000
    return error


CHAT_CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("temperature below 0", {"temperature": -0.1}, "temperature"),
    ("temperature above 2", {"temperature": 2.1}, "temperature"),
    ("temperature as text", {"temperature": "0.5"}, "temperature"),
    ("temperature as truth value", {"temperature": True}, "temperature"),
    ("temperature far too large for a float", {"temperature": 10**400}, "temperature"),
    ("top_p above 1", {"top_p": 1.01}, "top_p"),
    ("top_p below 0", {"top_p": -1}, "top_p"),
    ("top_k below -1", {"top_k": -2}, "top_k"),
    ("top_k as fraction", {"top_k": 1.5}, "top_k"),
    ("min_p above 1", {"min_p": 2}, "min_p"),
    ("max_tokens negative", {"max_tokens": -5}, "max_tokens"),
    ("max_tokens as text", {"max_tokens": "10"}, "max_tokens"),
    ("max_tokens beyond 64 bits", {"max_tokens": 2**80}, "max_tokens"),
    ("max_completion_tokens below -1", {"max_completion_tokens": -2}, "max_completion_tokens"),
    ("presence_penalty above 2", {"presence_penalty": 2.5}, "presence_penalty"),
    ("frequency_penalty below -2", {"frequency_penalty": -3}, "frequency_penalty"),
    ("repetition_penalty 0", {"repetition_penalty": 0}, "repetition_penalty"),
    ("repetition_penalty almost 0", {"repetition_penalty": 0.009}, "repetition_penalty"),
    ("n 0", {"n": 0}, "n"),
    ("n above the server's limit", {"n": 17}, "n"),
    ("n as list", {"n": [1]}, "n"),
    ("seed beyond 64 bits", {"seed": 2**63}, "seed"),
    ("seed as fraction", {"seed": 0.5}, "seed"),
    ("stop as number", {"stop": 3}, "stop"),
    ("stop with a number", {"stop": ["a", 1]}, "stop.1"),
    ("stop with too many strings", {"stop": ["a"] * 257}, "stop"),
    ("stream as text", {"stream": "yes"}, "stream"),
    ("stream_options as list", {"stream_options": []}, "stream_options"),
    (
        "include_usage as text",
        {"stream_options": {"include_usage": "yes"}},
        "stream_options.include_usage",
    ),
    ("logit_bias as list", {"logit_bias": [1]}, "logit_bias"),
    ("logit_bias of a word", {"logit_bias": {"hello": 1}}, "logit_bias"),
    ("logit_bias of a negative id", {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("logit_bias above 100", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("logit_bias of an id beyond the vocabulary", {"logit_bias": {"9999999": 1}}, "logit_bias"),
    ("logprobs as number", {"logprobs": 5}, "logprobs"),
    ("top_logprobs without logprobs", {"top_logprobs": 3}, "top_logprobs"),
    ("top_logprobs above 20", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat_template_kwargs as text", {"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    (
        "a template of the client's own",
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs",
    ),
    ("audio", {"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ("modalities with audio", {"modalities": ["text", "audio"]}, "modalities"),
    (
        "functions beside tools",
        {
            "functions": [{"name": "f"}],
            "tools": [{"type": "function", "function": {"name": "g"}}],
        },
        "functions",
    ),
    ("a prediction without content", {"prediction": {"type": "content"}}, "prediction.content"),
    ("web search", {"web_search_options": {}}, "web_search_options"),
    ("messages null", {"messages": None}, "messages"),
    ("messages empty", {"messages": []}, "messages"),
    ("messages as text", {"messages": "hi"}, "messages"),
    ("messages of texts", {"messages": ["hi"]}, "messages.0"),
    ("a message without role", {"messages": [{"content": "x"}]}, "messages.0.role"),
    ("an unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ("a user without content", {"messages": [{"role": "user"}]}, "messages.0"),
    (
        "content as number",
        {"messages": [*HELLO, {"role": "user", "content": 5}]},
        "messages.1.content",
    ),
    (
        "content as object",
        {"messages": [{"role": "user", "content": {"text": "x"}}]},
        "messages.0.content",
    ),
    (
        "a picture",
        {"messages": [{"role": "user", "content": [PICTURE]}]},
        "messages.0.content.0",
    ),
    (
        "a text part without text",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0",
    ),
    (
        "a part without type",
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "messages.0.content.0.type",
    ),
    (
        "a tool result that answers no call",
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0",
    ),
    (
        "a tool call without function",
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "messages.0.tool_calls.0",
    ),
    ("model as list", {"model": ["a"]}, "model"),
]


@pytest.mark.parametrize(
    ("change", "param"),
    [pytest.param(change, param, id=name) for name, change, param in CHAT_CASES],
)
def test_an_impossible_chat_request_is_refused(
    client: httpx.Client, change: dict[str, Any], param: str | None
) -> None:
    # httpx writes no infinities, and the cases have none: `json` is the standard library's.
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2} | change
    error = assert_refused(client.post(CHAT, content=json.dumps(body)))
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("change", [{"temperature": 9}, {"n": 17}, {"messages": []}], ids=str)
def test_a_stream_is_refused_before_it_begins(client: httpx.Client, change: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True} | change
    assert_refused(client.post(CHAT, json=body))


COMPLETION_CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("prompt null", {"prompt": None}, "prompt"),
    ("prompt as number", {"prompt": 5}, "prompt"),
    ("prompt as object", {"prompt": {"a": 1}}, "prompt"),
    ("prompt as empty list", {"prompt": []}, "prompt"),
    ("an empty prompt of tokens", {"prompt": [[]]}, "prompt.0"),
    ("texts and tokens mixed", {"prompt": ["a", 1]}, None),
    ("tokens as fractions", {"prompt": [1.5]}, None),
    ("a negative token", {"prompt": [-1]}, None),
    ("a token beyond the vocabulary", {"prompt": [1, 99999999]}, "prompt"),
    ("a token beyond 64 bits", {"prompt": [2**70]}, None),
    ("too many prompts", {"prompt": ["a"] * 257}, "prompt"),
    ("too many sequences", {"prompt": ["a"] * 100, "n": 16}, "prompt"),
    ("max_tokens below -1", {"max_tokens": -2}, "max_tokens"),
    ("logprobs as truth value", {"logprobs": True}, "logprobs"),
    ("logprobs above 20", {"logprobs": 21}, "logprobs"),
    ("best_of above n", {"best_of": 3}, "best_of"),
    ("suffix", {"suffix": "the end"}, "suffix"),
    ("echo as text", {"echo": "no"}, "echo"),
]


@pytest.mark.parametrize(
    ("change", "param"),
    [pytest.param(change, param, id=name) for name, change, param in COMPLETION_CASES],
)
def test_an_impossible_completion_request_is_refused(
    client: httpx.Client, change: dict[str, Any], param: str | None
) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2} | change
    error = assert_refused(client.post(TEXT, json=body))
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"hello",
        b"null",
        b"[]",
        b'"text"',
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": -Infinity}',
        b'{"model": "m", "prompt": "\xff\xfe"}',
        b'{"model": "m", "prompt": "\xed\xa0\x80"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "\\udfff\\ud83d"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "m", "max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"model": "m", "temperature": 1e999999}',
        '{"model": "m"}'.encode("utf-16"),
        b"model=m&prompt=hello",
        b"\x00" * 64,
    ],
    ids=lambda content: repr(content[:40]),
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.Client, path: str, content: bytes
) -> None:
    headers = {"content-type": "application/json"}
    assert_refused(client.post(path, content=content, headers=headers))


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "", "a/b/c"])
def test_json_is_understood_whatever_its_content_type_says(client: httpx.Client, kind: str) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 1})
    answer = client.post(CHAT, content=body, headers={"content-type": kind})
    assert answer.status_code == 200


def test_a_page_cannot_post_json_in_disguise(client: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 1})
    headers = {"content-type": "text/plain", "origin": "http://elsewhere.example"}
    assert_refused(client.post(CHAT, content=body, headers=headers), 403)


@pytest.mark.parametrize(
    "model",
    [
        "no-such-model",
        "../../../../etc/passwd",
        "/etc",
        "~",
        "..",
        "file:///etc/passwd",
        "http://127.0.0.1:1/model",
        "tiny-llama/../tiny-llama",
        "tiny-llama\x00",
        "x" * 100_000,
        "模型",
    ],
    ids=lambda model: repr(model[:30]),
)
def test_a_model_that_does_not_exist_is_not_found(client: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": HELLO, "max_tokens": 1}
    error = assert_refused(client.post(CHAT, json=body), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_its_own_code(
    client: httpx.Client, stream: bool
) -> None:
    messages = [{"role": "user", "content": "one two three " * CONTEXT}]
    body = {"model": MODEL, "messages": messages, "stream": stream}
    error = assert_refused(client.post(CHAT, json=body))
    assert error["code"] == "context_length_exceeded"


def test_token_ids_beyond_the_context_are_refused_too(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": [5] * (CONTEXT + 1), "max_tokens": 1}
    error = assert_refused(client.post(TEXT, json=body))
    assert error["code"] == "context_length_exceeded"


def test_a_body_of_20_mb_is_refused_by_its_declared_length(client: httpx.Client) -> None:
    error = assert_refused(client.post(CHAT, content=b"a" * 20_000_000), 413)
    assert error["code"] == "body_too_large"


def test_a_body_of_20_mb_is_refused_though_it_declares_no_length(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(200):
            yield b"a" * 100_000

    error = assert_refused(client.post(CHAT, content=chunks()), 413)
    assert error["code"] == "body_too_large"


def test_a_body_cut_short_harms_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b'{"model":')


def test_an_unknown_path_is_not_found(client: httpx.Client) -> None:
    assert_refused(client.get("/v1/nothing"), 404)
    assert_refused(client.post("/v1/chat/completions/"), 404)


def test_a_wrong_method_is_refused_and_the_right_one_named(client: httpx.Client) -> None:
    answer = client.get(CHAT)
    assert_refused(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert_refused(client.put("/v1/models"), 405)


@pytest.mark.parametrize(
    "path", ["/v1/models/no-such-model", "/v1/models/a/b/../../etc", "/v1/models/%00"]
)
def test_an_unknown_model_is_not_found_in_the_list(client: httpx.Client, path: str) -> None:
    assert_refused(client.get(path), 404)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil"])
def test_a_name_that_is_not_this_servers_is_refused(client: httpx.Client, host: str) -> None:
    error = assert_refused(client.get("/v1/models", headers={"host": host}))
    assert error["code"] == "invalid_host"


def test_a_sane_request_id_is_given_back_and_another_replaced(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "a.b-c_1"}).headers["x-request-id"] == (
        "a.b-c_1"
    )
    for odd in ("x" * 129, "a b", "a;b"):
        given = client.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert given.startswith("req_")


def test_fields_that_nobody_knows_are_tolerated(client: httpx.Client) -> None:
    extra = {"some_extension": {"a": [1]}, "user": "u", "store": False, "metadata": {"k": "v"}}
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1} | extra
    assert client.post(CHAT, json=body).status_code == 200


def test_nulls_mean_the_defaults(client: httpx.Client) -> None:
    names = (
        "temperature top_p n stop stream stream_options seed logprobs top_logprobs logit_bias "
        "presence_penalty frequency_penalty max_completion_tokens tools tool_choice functions "
        "response_format user audio prediction modalities chat_template_kwargs"
    )
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    answer = client.post(CHAT, json=body | dict.fromkeys(names.split()))
    assert answer.status_code == 200, answer.text
