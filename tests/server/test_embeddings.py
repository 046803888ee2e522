"""`/v1/embeddings` over HTTP, from a tiny encoder behind a real server."""

import asyncio
import base64
import os
import signal
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.bert import build_tiny_bert, wordpiece
from tests.support.server import CHAT, PLAIN, TEXT, Server, chat, serving, until
from tests.support.tiny import build_tiny_model

PATH = "/v1/embeddings"
MODEL = "tiny-bert"
LARGE = "larger-bert"
WIDTH = 32
CONTEXT = 64
TOKENS_PER_MINUTE = 1_000_000
LIVELY = 30.0

Post = Any


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    build_tiny_bert(models / MODEL, hidden=WIDTH, longest=CONTEXT)
    build_tiny_bert(models / LARGE, hidden=128, layers=4)
    build_tiny_model(models / "tiny-llama")
    with serving(
        tmp_path_factory.mktemp("home"),
        "--model",
        MODEL,
        model_dirs=[str(models)],
        tokens_per_minute=TOKENS_PER_MINUTE,
    ) as server:
        yield server


@pytest.fixture
def client(embedder: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=embedder.url, timeout=60, **PLAIN) as client:
        yield client


def body(given: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": given} | more


def embedded(client: httpx.Client, given: Any, **more: Any) -> list[list[float]]:
    """The vectors of what is given, which must be answered in full."""
    answer = client.post(PATH, json=body(given, **more))
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


# answers


def test_an_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = client.post(PATH, json=body(["Hello, world!", "The fox"])).json()
    tokens = sum(len(wordpiece().encode(text).ids) for text in ("Hello, world!", "The fox"))
    assert answer["object"] == "list"
    assert answer["model"] == MODEL
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [(one["object"], one["index"]) for one in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    for one in answer["data"]:
        assert len(one["embedding"]) == WIDTH
        assert sum(value**2 for value in one["embedding"]) == pytest.approx(1, abs=1e-5)


def test_inputs_come_in_four_forms(client: httpx.Client) -> None:
    texts = ["The quick brown fox", "A server answers requests"]
    tokens = [wordpiece().encode(text).ids for text in texts]
    vectors = embedded(client, texts)
    for given, wanted in (
        (texts[0], vectors[:1]),
        (tokens[0], vectors[:1]),
        (tokens, vectors),
    ):
        for ours, expected in zip(embedded(client, given), wanted, strict=True):
            assert ours == pytest.approx(expected, abs=1e-5)


def test_base64_holds_the_same_numbers(client: httpx.Client) -> None:
    [plain] = embedded(client, "Hello")
    [encoded] = embedded(client, "Hello", encoding_format="base64")
    assert isinstance(encoded, str)
    data = base64.b64decode(encoded, validate=True)
    assert struct.unpack(f"<{WIDTH}f", data) == pytest.approx(plain, abs=1e-6)


def test_fewer_dimensions_are_the_first_ones_at_length_1(client: httpx.Client) -> None:
    [whole] = embedded(client, "Hello")
    [short] = embedded(client, "Hello", dimensions=8)
    norm = sum(value**2 for value in whole[:8]) ** 0.5
    assert short == pytest.approx([value / norm for value in whole[:8]], abs=1e-5)


def test_vectors_come_in_the_order_of_the_texts(client: httpx.Client) -> None:
    texts = ["fox " * (1 + i * 7 % 40) for i in range(100)]
    vectors = embedded(client, texts)
    for index in (0, 17, 50, 99):
        [alone] = embedded(client, texts[index])
        assert vectors[index] == pytest.approx(alone, abs=1e-5)


def test_what_openai_and_this_server_know_besides_is_taken(client: httpx.Client) -> None:
    assert len(embedded(client, "Hello", user="somebody", priority=3, keep_alive="5m")) == 1


# refusals


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("", "input"),
        ([], "input"),
        (["Hello", ""], "input.1"),
        ([[]], "input.0"),
        (["Hello"] * 2049, "input"),
        ([["Hello"]], "input.0.0"),
        ({"text": "Hello"}, "input"),
        ([[5], [100_000]], "input.1"),
    ],
)
def test_a_bad_input_is_a_400_that_names_it(client: httpx.Client, given: Any, param: str) -> None:
    answer = client.post(PATH, json=body(given))
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    "long", ["fox " * CONTEXT, "fox " * 100_000, [7] * (CONTEXT + 1)], ids=["by few", "far", "ids"]
)
def test_a_text_beyond_the_context_is_a_400_that_names_its_index(
    client: httpx.Client, long: Any
) -> None:
    short: Any = "fox" if isinstance(long, str) else [7]
    answer = client.post(PATH, json=body([short, long, short]))
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input.1")
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "more", [{"dimensions": WIDTH + 1}, {"dimensions": 0}, {"encoding_format": "hex"}]
)
def test_a_bad_parameter_is_a_400_that_names_it(client: httpx.Client, more: dict[str, Any]) -> None:
    answer = client.post(PATH, json=body("Hello", **more))
    assert answer.status_code == 400
    assert error_of(answer)["param"] == next(iter(more))


def test_a_model_that_generates_makes_no_embeddings(client: httpx.Client) -> None:
    answer = client.post(PATH, json=body("Hello", model="tiny-llama"))
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "model_cannot_embed"
    assert client.post(CHAT, json=chat("tiny-llama", max_tokens=1)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_embedding_model_does_not_generate(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json=chat(MODEL, prompt="Hello"))
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "model_cannot_generate"
    assert "/v1/embeddings" in error_of(answer)["message"]


# limits, counts, ends


def test_tokens_are_charged_and_counted(client: httpx.Client) -> None:
    def remaining() -> int:
        answer = client.post(PATH, json=body("Hello"))
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    def counted() -> float:
        lines = client.get("/metrics").text.splitlines()
        name = f'vllm:prompt_tokens_total{{engine="0",model_name="{MODEL}"}} '
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    left, before = remaining(), counted()
    texts = ["The quick brown fox"] * 200
    used = client.post(PATH, json=body(texts)).json()["usage"]["prompt_tokens"]
    assert counted() == before + used
    assert remaining() <= left - used


def many_texts() -> list[str]:
    return [f"{i} {'the quick fox ' * (i % 12)}" for i in range(2048)]


async def working(server: Server, model: str) -> None:
    async def runs() -> bool:
        return bool((await server.models())[model]["in_flight"])

    await until(runs, LIVELY)


async def test_a_killed_engine_costs_nobody_a_vector(embedder: Server) -> None:
    asked = body(many_texts(), model=LARGE)
    async with embedder.client() as client:
        expected = (await client.post(PATH, json=asked)).json()
        before = (await embedder.models())[LARGE]["restarts"]
        asking = asyncio.create_task(client.post(PATH, json=asked))
        await working(embedder, LARGE)
        os.kill((await embedder.models())[LARGE]["pid"], signal.SIGKILL)
        answer = await asking
    assert answer.status_code == 200, answer.text
    assert (await embedder.models())[LARGE]["restarts"] == before + 1
    assert answer.json()["usage"] == expected["usage"]
    for ours, theirs in zip(answer.json()["data"], expected["data"], strict=True):
        assert ours["index"] == theirs["index"]
        assert ours["embedding"] == pytest.approx(theirs["embedding"], abs=1e-5)


async def test_a_client_that_goes_away_frees_the_engine(embedder: Server) -> None:
    async with embedder.client() as client:
        asking = asyncio.create_task(client.post(PATH, json=body(many_texts(), model=LARGE)))
        await working(embedder, LARGE)
        asking.cancel()
        await asyncio.wait([asking])
        await embedder.idle(LARGE, seconds=2.0)


def test_the_list_tells_what_an_embedding_model_takes(client: httpx.Client) -> None:
    assert client.get(f"/v1/models/{MODEL}").json()["context_length"] == CONTEXT
