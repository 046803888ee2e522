"""Draft models of a real server: chosen in settings or by the admin API, and told of."""

import asyncio
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.test_errors import assert_refused
from tests.support.bert import build_tiny_bert
from tests.support.server import CHAT, Answer, Server, ask, ask_through, chat, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_model

LOAD = "/admin/models/{}/load"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tiny_model(folder / "large", layers=4, hidden=128)
    shutil.copytree(folder / "large", folder / "small")
    build_tiny_model(folder / "other", extra_tokens=["<think>"])
    build_tiny_bert(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    flags = ("--model", "large", "--draft-model", "small")
    by_model = {"other": "", "bert": "small"}
    home = tmp_path_factory.mktemp("home")
    more = {"model_dirs": [str(models)], "draft_model_by_model": by_model}
    with serving(home, *flags, **more) as server:
        yield server


def sampled(seed: int, **more: Any) -> dict[str, Any]:
    body = chat("large", max_tokens=120, ignore_eos=True, temperature=0.8, seed=seed, stream=True)
    body |= {"logprobs": True, "top_logprobs": 3}
    return body | {"stream_options": {"include_usage": True}} | more


def alike(one: Answer, other: Answer) -> bool:
    """As `ties.same`; how much was guessed may differ."""
    return same(replace(one, usage=None), replace(other, usage=None))


async def test_a_model_with_a_draft_says_what_it_says_without(server: Server) -> None:
    bodies = [sampled(seed) for seed in range(4)]
    async with server.client(timeout=60) as client:
        answers = [await ask(client, CHAT, body) for body in bodies]
        status = (await server.models())["large"]
        await client.post("/admin/models/large/unload")
        await client.post(LOAD.format("large"), json={"draft_model": ""})
        plain = [await ask(client, CHAT, body) for body in bodies]
        alone = (await server.models())["large"]
        await client.post("/admin/models/large/unload")
        await client.post(LOAD.format("large"), json={"draft_model": "small"})
    assert status["draft_model"] == "small"
    assert status["guessed"] >= status["accepted"]
    ties = sum(alike(one, other) for one, other in zip(answers, plain, strict=True))
    assert ties <= 1, "a pass of several tokens rounds otherwise"
    assert alone["draft_model"] is None
    assert status["need"] > 1.5 * alone["need"], "its memory is reserved"


async def test_the_end_of_an_engine_with_a_draft_loses_nothing(server: Server) -> None:
    async with server.client(timeout=60) as client:
        expected = await asyncio.gather(*(ask(client, CHAT, sampled(seed)) for seed in range(4)))
        before = (await server.idle("large"))["restarts"]

        async def kill() -> None:
            server.engines()[0].send_signal(signal.SIGKILL)

        answers = await ask_through(kill, client, [sampled(seed) for seed in range(4)])
        ties = sum(alike(one, other) for one, other in zip(answers, expected, strict=True))
        assert ties <= 1

        async def replaced() -> bool:
            return bool((await server.models())["large"]["restarts"] == before + 1)

        await until(replaced, 30)
        assert (await server.models())["large"]["draft_model"] == "small"


async def test_a_draft_is_chosen_when_a_model_is_loaded(server: Server) -> None:
    async with server.client(timeout=60) as client:
        answer = await client.post(LOAD.format("small"))
        assert answer.json()["draft_model"] is None, "a model needs none of itself"
        refused = await client.post(LOAD.format("small"), json={"draft_model": "large"})
        assert_refused(refused, 400)
        assert "loaded with no draft model; unload it first" in refused.text
        await client.post("/admin/models/small/unload")
        answer = await client.post(LOAD.format("small"), json={"draft_model": "large"})
        assert answer.json()["draft_model"] == "large", answer.text
        again = await client.post(LOAD.format("small"), json={"draft_model": "large"})
        assert again.status_code == 200
        await client.post("/admin/models/small/unload")
        answer = await client.post(LOAD.format("small"), json={"draft_model": ""})
        assert answer.json()["draft_model"] is None
        await client.post("/admin/models/small/unload")
        assert_refused(await client.post(LOAD.format("small"), json={"draft_model": "none"}), 404)


async def test_a_draft_that_cannot_guess_is_refused_with_a_reason(server: Server) -> None:
    async with server.client(timeout=60) as client:
        for model, draft, reason in (
            ("other", "small", "vocabularies differ"),
            ("small", "other", "vocabularies differ"),
            ("small", "bert", "makes embeddings"),
        ):
            refused = await client.post(LOAD.format(model), json={"draft_model": draft})
            assert_refused(refused, 503)
            status = (await server.models())[model]
            assert status["state"] == "failed"
            assert reason in status["reason"]
            assert reason in refused.text
        answer = await client.post(LOAD.format("small"), json={"draft_model": ""})
        assert answer.json()["state"] == "ready", answer.text
        await client.post("/admin/models/small/unload")


async def test_a_model_that_makes_embeddings_has_no_draft(server: Server) -> None:
    async with server.client(timeout=60) as client:
        answer: httpx.Response = await client.post(LOAD.format("bert"))
        assert (answer.json()["state"], answer.json()["draft_model"]) == ("ready", None)
