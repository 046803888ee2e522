"""A model divided among machines with addresses of their own, whose network may be cut."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_ranks import SETTINGS, all_of, asked, ranks_of
from tests.support.hosts import SECRET, Worker, over, working
from tests.support.network import Machine, machines
from tests.support.server import Answer, Server, ask_through, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_model

PATIENCE = 60.0
PORT = 32322
WAIT = 6.0
"""`host_wait`."""
NOTICED = 15.0
"""Seconds in which both sides find a cut network."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


@pytest.fixture(scope="module")
def two() -> Iterator[list[Machine]]:
    with machines(2) as made:
        yield made


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, two: list[Machine]) -> Iterator[Worker]:
    home = tmp_path_factory.mktemp("second")
    first, second = two
    with working(home, PORT, host=first.inside, before=second.run) as made:
        yield made


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, two: list[Machine], worker: Worker, model: Path
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    flags = ["--model", str(model), "--worker", "second", *reachable(two[0])]
    own: dict[str, Any] = {"worker_secret": SECRET, "host_wait": WAIT, "hang_timeout": 120}
    settings = SETTINGS | own
    with serving(home, *flags, before=two[0].run, steps_may_fail=True, **settings) as made:
        yield made


def reachable(first: Machine) -> list[str]:
    assert first.outside is not None
    return ["--host", first.outside, "--allow-no-key"]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[Answer]:
    """What the same ranks answer when nothing happens; `test_hosts` compares with one process."""

    async def answers() -> list[Answer]:
        async with server.client(timeout=300) as client:
            return await all_of(client, asked(TOKENS))

    return asyncio.run(answers())


TOKENS = 50


async def test_machines_say_what_they_always_say(
    server: Server, two: list[Machine], expected: list[Answer]
) -> None:
    async with server.client(timeout=300) as client:
        for answer, known in zip(await all_of(client, asked(TOKENS)), expected, strict=True):
            same(answer, known)
    [engine] = (await server.models())["tiny"]["replicas"]
    assert [rank["host"] for rank in engine["ranks"]] == ["", "second"]


@pytest.mark.soak
async def test_a_cut_network_heals_when_the_link_is_back(
    server: Server, two: list[Machine], worker: Worker, expected: list[Answer]
) -> None:
    ranks = await ranks_of(server)
    async with server.client(timeout=300) as client:

        async def cut() -> None:
            two[1].link("down")
            # Neither side hears that the other has gone.
            await gone(ranks, NOTICED)
            two[1].link("up")

        answers = await ask_through(cut, client, asked(TOKENS))
        for answer, known in zip(answers, expected, strict=True):
            same(answer, known)
    await ranks_of(server, other_than=ranks)


async def gone(ranks: list[int], seconds: float) -> None:
    async def all_over() -> bool:
        return all(map(over, ranks))

    await until(all_over, seconds)


@pytest.mark.soak
async def test_a_machine_that_stays_away_fails_the_model_by_its_name(
    server: Server, two: list[Machine]
) -> None:
    ranks = await ranks_of(server)
    async with server.client(timeout=300) as client:
        [body, *_] = asked(3000)
        streams = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await server.works("tiny")
        two[1].link("down")
        try:
            answer = await streams
            state = (await server.models())["tiny"]
        finally:
            two[1].link("up")
        away = f"host `second` is away: no worker of it has joined within {WAIT:g} seconds"
        assert state["state"] == "failed"
        assert away in state["reason"]
        assert away in answer.text
        await gone(ranks, NOTICED)
        # Once it is back, whoever asks gets an answer.
        await until(lambda: answered(server), PATIENCE)


async def answered(server: Server) -> bool:
    async with server.client(timeout=60) as client:
        body = asked(5)[0] | {"stream": False, "stream_options": None}
        return (await client.post("/v1/chat/completions", json=body)).status_code == 200
