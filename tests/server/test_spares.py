"""A model divided among two of three machines, for which workers on this one stand."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.test_hosts import ours
from tests.server.test_ranks import all_of, asked, ranks_of
from tests.support.hosts import Three, three_machines
from tests.support.server import CHAT, Server, ask_through, logged, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_model

TOKENS = 50
WAIT = 3.0
"""`host_wait`; a spare is taken before."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    with three_machines(tmp_path_factory.mktemp("three")) as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, three: Three) -> Iterator[Server]:
    model = build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)
    flags = ("--model", str(model), "--ranks", "2", "--worker", "second", "--worker", "third")
    own: dict[str, Any] = {"host_wait": WAIT, "hang_timeout": 120}
    with serving(
        tmp_path_factory.mktemp("home"), *flags, steps_may_fail=True, **ours(three.port) | own
    ) as made:
        yield made


async def hosts_of(server: Server) -> list[str]:
    [engine] = (await server.models())["tiny"]["replicas"]
    return [rank["host"] for rank in engine["ranks"]]


async def test_a_spare_takes_the_place_of_a_machine_that_goes(server: Server, three: Three) -> None:
    """No stream notices."""
    ranks = await ranks_of(server)
    assert await hosts_of(server) == ["", "second"]
    async with server.client(timeout=300) as client:
        bodies = asked(TOKENS)
        expected = await all_of(client, bodies)

        async def leave() -> None:
            three.go("second")

        answers = await ask_through(leave, client, bodies)
        for answer, known in zip(answers, expected, strict=True):
            same(answer, known)
    await ranks_of(server, other_than=ranks)
    assert await hosts_of(server) == ["", "third"]
    [taken] = logged(server.log.read_text(), "spare_taken")
    assert (taken["host"], taken["instead_of"]) == ("third", "second")


async def test_without_a_spare_the_model_fails_until_a_machine_is_back(
    server: Server, three: Three
) -> None:
    [body, *_] = asked(3000)
    async with server.client(timeout=300) as client:
        streams = asyncio.create_task(client.post(CHAT, json=body))
        await server.works("tiny")
        three.go("second")
        three.go("third")
        answer = await streams
        state = (await server.models())["tiny"]
        away = f"host `second` is away: no worker of it has joined within {WAIT:g} seconds"
        assert state["state"] == "failed"
        assert f"{away}, nor one of `third` in its place" in state["reason"]
        assert away in answer.text
        three.come("second")

        async def answered() -> bool:
            short = asked(5)[0] | {"stream": False, "stream_options": None}
            return (await client.post(CHAT, json=short)).status_code == 200

        await until(answered, 60)
    assert await hosts_of(server) == ["", "second"]
