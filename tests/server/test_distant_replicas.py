"""Replicas on machines of their own, for which workers on this one stand, behind a real server."""

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.server.test_hosts import ours
from tests.server.test_replicas import assert_next_turns_find_their_prefix, turn
from tests.support.hosts import Three, free_port, over, three_machines, working
from tests.support.server import CHAT, Answer, Server, ask, ask_through, logged, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_adapter, build_tiny_model

CHATS = 6
PATIENCE = 60.0


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    with three_machines(tmp_path_factory.mktemp("three")) as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, three: Three, model: Path) -> Iterator[Server]:
    flags = ("--model", str(model), "--replicas", "3", "--worker", "second", "--worker", "third")
    own: dict[str, Any] = {"disk_cache": "off", "prefix_cache": "100%", "hang_timeout": 120}
    home = tmp_path_factory.mktemp("home")
    build_tiny_adapter(model, home / "adapters" / "tiny" / "poet")
    with serving(home, *flags, may_hang=True, **ours(three.port) | own) as made:
        yield made


async def replicas_of(
    server: Server, restarts: int = 0, model: str = "tiny"
) -> list[dict[str, Any]]:
    """Once all are there, after so many restarts."""
    found: list[dict[str, Any]] = []

    async def whole() -> bool:
        nonlocal found
        found = (await server.models())[model]["replicas"]
        ready = all(one["state"] == "ready" for one in found)
        return ready and sum(one["restarts"] for one in found) >= restarts

    await until(whole, PATIENCE, lambda: f"{found}")
    return found


async def test_each_machine_has_an_engine(server: Server) -> None:
    replicas = await replicas_of(server)
    assert [one["host"] for one in replicas] == ["", "second", "third"]
    assert [one["ranks"] for one in replicas] == [[], [], []]
    for one in replicas:
        assert "mlx_server.engine.worker" in psutil.Process(one["pid"]).cmdline()
    state = (await server.models())["tiny"]
    assert state["pid"] == replicas[0]["pid"]


async def test_turns_of_chats_go_where_their_prefix_is(server: Server) -> None:
    await replicas_of(server)
    await assert_next_turns_find_their_prefix(server, CHATS)


async def test_the_end_of_a_machine_loses_nothing_and_it_comes_back(
    server: Server, three: Three
) -> None:
    before = await replicas_of(server)
    asked = [turn(100 + i, tokens=150) for i in range(CHATS)]
    async with server.client(timeout=60) as client:
        expected = await asyncio.gather(*(ask(client, CHAT, body) for body in asked))

        async def leave() -> None:
            three.go("third")

        answers = await ask_through(leave, client, asked)
        for answer, known in zip(answers, expected, strict=True):
            known.usage = answer.usage  # which tells what the second time was cached
            same(answer, known)

    async def ended() -> bool:
        return over(before[2]["pid"])

    await until(ended, 2.0)
    state = (await server.models())["tiny"]
    assert state["state"] == "ready"
    third = state["replicas"][2]
    assert (third["state"], third["host"], third["pid"]) == ("restarting", "third", None)
    lost = logged(server.log.read_text(), "engine_ended")[-1]
    assert lost["lost_host"] == "third"
    three.come("third")
    after = await replicas_of(server, restarts=1)
    assert [one["host"] for one in after] == ["", "second", "third"]
    assert after[:2] == [one | {"in_flight": 0} for one in before[:2]]


async def test_an_engine_elsewhere_that_is_killed_is_replaced(server: Server) -> None:
    before = await replicas_of(server)
    psutil.Process(before[1]["pid"]).send_signal(signal.SIGKILL)
    restarts = sum(one["restarts"] for one in before)
    after = await replicas_of(server, restarts=restarts + 1)
    assert after[1]["host"] == "second"
    assert after[1]["pid"] != before[1]["pid"]
    assert logged(server.log.read_text(), "engine_ended")[-1]["how"] == "signal 9"


async def test_a_machine_that_refuses_is_asked_again_when_it_comes_back(
    server: Server, three: Three
) -> None:
    await replicas_of(server)
    three.go("third")
    three.come("third", memory_limit="1024")
    third: dict[str, Any] = {}

    async def failed() -> bool:
        nonlocal third
        third = (await server.models())["tiny"]["replicas"][2]
        return bool(third["state"] == "failed")

    await until(failed, PATIENCE)
    assert third["reason"].startswith("host `third`: its part of the model needs ")
    async with server.client() as client:
        assert (await ask(client, CHAT, turn(400, tokens=5))).text
    three.go("third")
    three.come("third")
    after = await replicas_of(server)
    assert [(one["host"], one["reason"]) for one in after][2] == ("third", None)


@pytest.mark.soak
async def test_an_adapter_is_applied_in_each_replica(server: Server) -> None:
    await replicas_of(server)
    bodies = [turn(500 + i, tokens=24) for i in range(CHATS)]
    adapted = [body | {"model": "tiny@poet"} for body in bodies]
    async with server.client(timeout=60) as client:
        plain = await ask(client, CHAT, bodies[0])
        alone = [await ask(client, CHAT, body) for body in adapted]
        await replicas_of(server, model="tiny@poet")
        together = await asyncio.gather(*(ask(client, CHAT, body) for body in adapted))
        await client.post("/admin/models/tiny@poet/unload")
    assert alone[0].text != plain.text
    for answer, known in zip(together, alone, strict=True):
        known.usage = answer.usage
        same(answer, known)


@pytest.mark.soak
async def test_a_machine_that_falls_silent_loses_nothing(server: Server, three: Three) -> None:
    """As one does whose network is cut; on its side it ends what nobody hears any more."""
    before = await replicas_of(server)
    restarts = sum(one["restarts"] for one in before)
    asked = [turn(200 + i, tokens=150) for i in range(CHATS)]
    async with server.client(timeout=60) as client:
        expected = await asyncio.gather(*(ask(client, CHAT, body) for body in asked))

        async def fall_silent() -> None:
            three.signal("second", signal.SIGSTOP)

        answers = await ask_through(fall_silent, client, asked)
        for answer, known in zip(answers, expected, strict=True):
            known.usage = answer.usage
            same(answer, known)
    three.signal("second", signal.SIGCONT)
    await replicas_of(server, restarts + 1)
    assert over(before[1]["pid"])


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_whatever_ends_no_stream_notices(server: Server, three: Three) -> None:
    """Any engine, or a machine, again and again."""
    rng = random.Random(7)
    bodies = [turn(300 + i, tokens=200) for i in range(CHATS)]
    ends = [rng.randrange(4) for _ in range(16)]
    answers = ties = 0
    done = asyncio.Event()
    async with server.client(timeout=300) as client:
        expected = await asyncio.gather(*(ask(client, CHAT, body) for body in bodies))

        async def repeat(body: dict[str, Any], known: Answer) -> None:
            nonlocal answers, ties
            while not done.is_set():
                answer = await ask(client, CHAT, body)
                known.usage = answer.usage
                ties += same(answer, known)
                answers += 1

        async with asyncio.TaskGroup() as group:
            for body, known in zip(bodies, expected, strict=True):
                group.create_task(repeat(body, known))
            for end in ends:
                replicas = await replicas_of(server)
                restarts = sum(one["restarts"] for one in replicas)
                await asyncio.sleep(rng.random() / 2)
                if end == 3:
                    three.go("third")
                    three.come("third")
                else:
                    psutil.Process(replicas[end]["pid"]).send_signal(signal.SIGKILL)
                await replicas_of(server, restarts + 1)
            done.set()
    print(f"{len(ends)} ends, {answers} answers, {ties} near-ties")
    assert ties <= 1 + answers // 4


@pytest.mark.soak
async def test_all_ends_with_the_server(model: Path, tmp_path: Path) -> None:
    """Even one that is killed."""
    port = free_port()
    flags = ("--model", str(model), "--replicas", "2", "--worker", "second")
    with (
        working(tmp_path / "second", port) as worker,
        serving(tmp_path / "home", *flags, **ours(port)) as server,
    ):
        pids = [one["pid"] for one in await replicas_of(server)]
        assert pids[1:] == [one.pid for one in worker.ranks()]
        server.process.kill()

        async def all_over() -> bool:
            return all(map(over, pids))

        await until(all_over, 2.0)
