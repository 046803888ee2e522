"""What clients of local servers send, though OpenAI's do not."""

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import CONTEXT, MODEL
from tests.support.raw import Raw
from tests.support.server import CHAT, HELLO, TEXT, Server

BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}, TEXT: {"prompt": "Hello"}}
ENDLESS = {"model": MODEL, "ignore_eos": True, "temperature": 0}


def answer(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=BODIES[path] | fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("limit", [CONTEXT, 2**53 - 1, -1])
def test_a_limit_beyond_the_context_is_cut_to_the_room_left(
    client: httpx.Client, limit: int
) -> None:
    said = answer(client, TEXT, prompt=[5] * (CONTEXT - 9), max_tokens=limit, **ENDLESS)
    assert said["choices"][0]["finish_reason"] == "length"
    assert said["usage"]["completion_tokens"] == 9
    short = {"model": MODEL, "guided_choice": ["yes", "no"]}
    for field in ("max_tokens", "max_completion_tokens"):
        said = answer(client, CHAT, **short, **{field: limit})
        assert said["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_prompt_that_leaves_no_room_is_refused_whatever_the_limit(client: httpx.Client) -> None:
    for limit in (1, CONTEXT, -1):
        body = ENDLESS | {"prompt": [5] * CONTEXT, "max_tokens": limit}
        refused = client.post(TEXT, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=str)
def test_a_model_left_out_is_the_loaded_one(
    client: httpx.Client, path: str, model: dict[str, Any]
) -> None:
    assert answer(client, path, max_tokens=1, **model)["model"] == MODEL


def test_tokens_are_counted_without_a_model_too(client: httpx.Client) -> None:
    counted = client.post("/tokenize", json={"prompt": "Hello"}).json()
    spoken = client.post("/detokenize", json={"tokens": [float(one) for one in counted["tokens"]]})
    assert spoken.json()["content"] == "Hello"


def test_seed_minus_one_is_another_each_time(client: httpx.Client) -> None:
    body = ENDLESS | {"temperature": 2, "max_tokens": 12}
    drawn = {answer(client, TEXT, seed=-1.0, **body)["choices"][0]["text"] for _ in range(3)}
    fixed = {answer(client, TEXT, seed=7.0, **body)["choices"][0]["text"] for _ in range(2)}
    assert (len(drawn), len(fixed)) == (3, 1)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"stop": [f"<stop {n}>" for n in range(40)]},
        {"n": 1.0, "max_tokens": 2.0, "top_k": 40.0, "priority": 1.0},
        {"max_completion_tokens": 0, "logit_bias": {"5": 1}},
    ],
    ids=str,
)
def test_what_other_servers_take_is_taken(
    client: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    said = answer(client, path, **{"model": MODEL, "max_tokens": 2} | fields)
    assert said["usage"]["completion_tokens"] <= 2


# HTTP


PAGES = ["/health", "/ready", "/metrics", "/docs", "/redoc", "/openapi.json"]


@pytest.mark.parametrize("path", [*PAGES, "/v1/models", f"/v1/models/{MODEL}", "/admin/models"])
def test_head_is_answered_where_get_is(client: httpx.Client, path: str) -> None:
    head, got = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    # The next request on the connection is not disturbed.
    assert client.head(path).status_code == 200


def test_head_is_refused_where_get_is(client: httpx.Client) -> None:
    refused = client.head(CHAT)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert client.head("/v1/nothing").status_code == 404


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_old_client_gets_no_chunks(server: Server, stream: bool) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 3, "stream": stream})
    with Raw(server) as raw:
        head = f"POST {CHAT} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.socket.sendall((head + body).encode())
        head, content = raw.whole()
    assert "transfer-encoding" not in head
    assert "connection: close" in head
    if stream:
        assert content.startswith("data: {")
        assert content.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(content)["model"] == MODEL
