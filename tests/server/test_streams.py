"""What a client reads: whole characters, no stop string, the same text streamed and not."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.support.server import CHAT, TEXT, Server, ask, chat, serving, until
from tests.support.tiny import build_scripted_model, build_tiny_model

EMOJI = "Hi 🎉🦊 日本 👩‍🚀 ✨ done"
PANGRAM = "The quick brown fox jumps over a lazy dog"
LONG_CONTEXT = 60_000
PING_SECONDS = 0.05


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("streams")
    folder = home / "models"
    build_scripted_model(folder / "emoji", EMOJI)
    build_scripted_model(folder / "pangram", PANGRAM)
    build_tiny_model(folder / "tiny", context=LONG_CONTEXT)
    names = ("emoji", "pangram", "tiny")
    flags = [flag for name in names for flag in ("--model", str(folder / name))]
    with serving(home, *flags, ping_interval=PING_SECONDS, prefill_chunk=64) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


def text(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "One two", "temperature": 0} | more


async def test_an_emoji_answer_streams_whole_characters(client: httpx.AsyncClient) -> None:
    answer = await ask(client, CHAT, chat("emoji", stream=True))
    assert answer.text == EMOJI
    assert all("\ufffd" not in piece for piece in answer.pieces)
    assert len([piece for piece in answer.pieces if piece]) > 8
    assert (answer.reason, answer.done) == ("stop", True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("n fox j", "The quick brow"),
        (["lazy dog", "x jumps o"], "The quick brown fo"),
        ("The", ""),
        ("dog", PANGRAM.removesuffix("dog")),
        ("dogs", PANGRAM),
    ],
)
async def test_a_stop_string_over_tokens_is_never_shown_and_nothing_after_it(
    client: httpx.AsyncClient, server: Server, stop: Any, shown: str, stream: bool
) -> None:
    for path, body in ((CHAT, chat("pangram")), (TEXT, text("pangram"))):
        answer = await ask(client, path, body | {"stop": stop, "stream": stream})
        assert (answer.text, answer.reason, answer.done) == (shown, "stop", True)
    await server.idle("pangram")


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 60},
        {"max_tokens": 60, "temperature": 1, "seed": 5},
        {"max_tokens": 60, "temperature": 0.9, "top_p": 0.8, "seed": 6, "stop": ["e", "t"]},
        {"max_tokens": 40, "temperature": 1, "top_k": 30, "seed": 7, "frequency_penalty": 0.7},
        {"max_tokens": 30, "temperature": 1, "seed": 8, "n": 3},
    ],
    ids=["greedy", "seeded", "stops", "penalty", "choices"],
)
async def test_streamed_text_is_the_text_of_the_whole_answer(
    client: httpx.AsyncClient, more: dict[str, Any]
) -> None:
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    for path, body in ((CHAT, chat("tiny", **more)), (TEXT, text("tiny", **more))):
        whole = await ask(client, path, body)
        streamed = await ask(client, path, body | with_usage)
        assert streamed.texts == whole.texts
        assert streamed.reasons == whole.reasons
        assert counts(streamed.usage) == counts(whole.usage)
        assert streamed.done


def counts(usage: dict[str, Any] | None) -> dict[str, Any]:
    """The numbers of tokens; how many of them were cached depends on what came before."""
    assert usage is not None
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


@pytest.mark.parametrize("count", [1, 2, 7, 33])
async def test_max_tokens_is_exact(client: httpx.AsyncClient, count: int) -> None:
    body = chat("tiny", max_tokens=count, ignore_eos=True)
    whole = await ask(client, CHAT, body)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = await ask(client, CHAT, body | usage)
    for answer in (whole, streamed):
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == count
        assert answer.reason == "length"


async def test_three_choices_are_three_texts_and_all_are_counted(
    client: httpx.AsyncClient,
) -> None:
    body = chat("tiny", n=3, temperature=1, seed=1, max_tokens=20, ignore_eos=True)
    answer = await ask(client, CHAT, body)
    assert sorted(answer.texts) == [0, 1, 2]
    assert len(set(answer.texts.values())) == 3
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 60
    assert await ask(client, CHAT, body) == answer


async def test_a_seed_gives_the_same_text_alone_and_among_seven_others(
    client: httpx.AsyncClient,
) -> None:
    body = chat("tiny", temperature=1, seed=42, max_tokens=40)
    alone = await ask(client, CHAT, body)
    others = [chat("tiny", temperature=1, seed=i, max_tokens=80, stream=True) for i in range(7)]
    answers = await asyncio.gather(*(ask(client, CHAT, one) for one in (*others, body)))
    assert answers[-1].text == alone.text


def joined(parts: list[dict[str, Any]]) -> str:
    """The text that the chat log-probabilities spell."""
    entries = [entry for part in parts for entry in part["content"]]
    return b"".join(bytes(entry["bytes"]) for entry in entries).decode()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_log_probabilities_join_back_to_the_text(
    client: httpx.AsyncClient, stream: bool
) -> None:
    asking = {"logprobs": True, "top_logprobs": 3, "stream": stream}
    for model, shown in (("emoji", EMOJI), ("pangram", PANGRAM)):
        answer = await ask(client, CHAT, chat(model, **asking))
        assert joined(answer.logprobs[0]) == answer.text == shown
    answer = await ask(client, CHAT, chat("tiny", max_tokens=12, ignore_eos=True, **asking))
    entries = [entry for part in answer.logprobs[0] for entry in part["content"]]
    assert len(entries) == 12
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0


async def test_a_prompt_is_scored_without_a_completion(client: httpx.AsyncClient) -> None:
    prompt = "The capital of France is Paris."
    body = text("tiny", prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    answer = await ask(client, TEXT, body)
    assert (answer.text, answer.reason) == (prompt, "length")
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 0
    [scores] = answer.logprobs[0]
    assert len(scores["tokens"]) == answer.usage["prompt_tokens"]
    assert scores["token_logprobs"][0] is None
    assert all(value <= 0 and math.isfinite(value) for value in scores["token_logprobs"][1:])
    assert scores["text_offset"] == sorted(scores["text_offset"])


async def test_an_echo_with_a_completion_scores_both(client: httpx.AsyncClient) -> None:
    body = text("tiny", echo=True, logprobs=0, max_tokens=5, ignore_eos=True)
    answer = await ask(client, TEXT, body)
    bare = await ask(client, TEXT, text("tiny", max_tokens=5, ignore_eos=True))
    assert answer.text == "One two" + bare.text
    [scores] = answer.logprobs[0]
    assert answer.usage is not None
    assert len(scores["token_logprobs"]) == answer.usage["total_tokens"]


async def test_fifty_streams_at_once_all_complete(client: httpx.AsyncClient) -> None:
    bodies = [
        chat("tiny", stream=True, temperature=1, seed=i, max_tokens=20 + i, ignore_eos=True)
        for i in range(50)
    ]
    answers = await asyncio.gather(*(ask(client, CHAT, body) for body in bodies))
    assert all(answer.done and answer.reason == "length" for answer in answers)
    assert len({answer.text for answer in answers}) == 50


def long_prompt(seed: int) -> list[int]:
    """A prompt that takes long to compute, and of which nothing has been computed before."""
    generator = random.Random(seed)
    return [5 + generator.randrange(200) for _ in range(LONG_CONTEXT - 100)]


async def test_a_long_prefill_is_bridged_by_pings(
    client: httpx.AsyncClient, server: Server
) -> None:
    body = text("tiny", prompt=long_prompt(0), max_tokens=1, stream=True)
    pings = 0
    async with client.stream("POST", TEXT, json=body) as response:
        async for line in response.aiter_lines():
            assert not line.startswith("data: "), "the prompt was too short for this test"
            pings += line.startswith(":")
            if pings == 3:
                break
    await server.idle("tiny")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_leaves_in_a_long_prefill_ends_it(
    client: httpx.AsyncClient, server: Server, stream: bool
) -> None:
    body = text("tiny", prompt=long_prompt(1 + stream), max_tokens=5, stream=stream)
    asking = asyncio.create_task(ask(client, TEXT, body))

    async def prefilling() -> bool:
        return (await server.models())["tiny"]["running"] == 1

    await until(prefilling, 5)
    asking.cancel()
    await asyncio.wait([asking])
    state = await server.idle("tiny", 1.0)
    assert state["memory"]["active"] - state["prefix_cache"]["bytes"] < 2 * state["size"]
