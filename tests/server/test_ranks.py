"""A model divided among two processes behind a real server: whatever ends, no stream notices."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server import CHAT, Answer, Server, ask, chat, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_model

STREAMS = 8
PATIENCE = 60.0
HANG_SECONDS = 3.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    flags = ("--model", str(model), "--ranks", "2")
    with serving(home, *flags, may_hang=True, steps_may_fail=True, **SETTINGS) as server:
        yield server


SETTINGS: dict[str, Any] = {"prefix_cache": "0", "hang_timeout": HANG_SECONDS}
"""Nothing is kept, so that usage repeats."""


def asked(tokens: int) -> list[dict[str, Any]]:
    """Streams, half of them greedy; all tell log-probabilities to judge a difference by."""
    bodies = []
    for i in range(STREAMS):
        how = {"temperature": i % 2, "seed": i, "top_p": 0.9, "frequency_penalty": 0.3 * (i % 3)}
        messages = [{"role": "user", "content": "Tell me more. " * (i + 1)}]
        bodies.append(
            chat("tiny", max_tokens=tokens, ignore_eos=True, stream=True, **how)
            | {"messages": messages, "logprobs": True, "top_logprobs": 2}
            | {"stream_options": {"include_usage": True}}
        )
    return bodies


async def all_of(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(client, CHAT, body) for body in bodies)))


async def ranks_of(server: Server) -> list[int]:
    """Process ids of the model's ranks, once all are there and have said so."""
    found: list[int] = []

    async def there() -> bool:
        nonlocal found
        [engine] = (await server.models())["tiny"]["replicas"]
        found = [rank["pid"] for rank in engine["ranks"] if rank["memory"]]
        return engine["state"] == "ready" and len(found) == 2 and all(map(psutil.pid_exists, found))

    await until(there, PATIENCE, lambda: f"ranks: {found}")
    return found


async def end_at_random(server: Server, kills: int, tokens: int) -> None:
    """Kill any rank again and again while streams run; all get the text that they get alone."""
    rng = random.Random(5)
    async with server.client(timeout=300) as client:
        bodies = asked(tokens)
        expected = await all_of(client, bodies)
        answers = ties = 0
        done = asyncio.Event()

        async def repeat(body: dict[str, Any], known: Answer) -> None:
            nonlocal answers, ties
            while not done.is_set():
                ties += same(await ask(client, CHAT, body), known)
                answers += 1

        async with asyncio.TaskGroup() as group:
            for body, known in zip(bodies, expected, strict=True):
                group.create_task(repeat(body, known))
            for _ in range(kills):
                ranks = await ranks_of(server)
                await asyncio.sleep(rng.random() / 2)  # at any moment
                os.kill(rng.choice(ranks), signal.SIGKILL)
            done.set()
    await server.idle("tiny", PATIENCE)
    state = (await server.models())["tiny"]
    print(f"{kills} kills, {state['restarts']} restarts, {answers} answers, {ties} near-ties")
    assert ties <= 1 + answers // 4
    # The processes of an engine that has ended are gone.
    assert len(server.engines()) == 1
    assert len([one for one in server.children() if is_rank(one)]) == 1


def is_rank(process: psutil.Process) -> bool:
    return "mlx_server.engine.follower" in process.cmdline()


async def test_killed_ranks_change_nothing_in_any_stream(two: Server) -> None:
    await end_at_random(two, kills=3, tokens=120)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_fifty_killed_ranks_change_nothing_in_any_stream(two: Server) -> None:
    await end_at_random(two, kills=50, tokens=400)


async def test_a_stopped_rank_is_replaced_and_its_memory_freed(two: Server) -> None:
    bodies = asked(200)
    async with two.client(timeout=300) as client:
        expected = await all_of(client, bodies)
        streams = asyncio.create_task(all_of(client, bodies))
        follower = psutil.Process((await ranks_of(two))[1])
        follower.send_signal(signal.SIGSTOP)
        for answer, known in zip(await streams, expected, strict=True):
            same(answer, known)

    async def gone() -> bool:
        return not follower.is_running()

    await until(gone, PATIENCE)
    assert (await ranks_of(two))[1] != follower.pid


async def test_operators_see_each_rank(two: Server) -> None:
    ranks = await ranks_of(two)
    parts: list[int] = []

    async def equal() -> bool:
        nonlocal parts
        state = await two.idle("tiny", PATIENCE)
        [engine] = state["replicas"]
        assert engine["pid"] == state["pid"] == ranks[0]
        assert [(rank["rank"], rank["pid"]) for rank in engine["ranks"]] == list(enumerate(ranks))
        parts = [rank["memory"]["active"] for rank in engine["ranks"]]
        assert state["memory"]["active"] == sum(parts)
        return parts[0] == pytest.approx(parts[1], rel=0.2)

    await until(equal, PATIENCE, lambda: f"unequal parts: {parts}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_five_hundred_requests_with_aborts_lose_and_double_nothing(two: Server) -> None:
    rng = random.Random(8)
    bodies = [body | {"max_tokens": tokens} for body in asked(0) for tokens in (1, 20, 60)]
    async with two.client(timeout=300) as client:
        expected = [await ask(client, CHAT, body) for body in bodies]
        crowd = asyncio.Semaphore(24)
        complete = 0

        async def one() -> None:
            nonlocal complete
            async with crowd:
                place = rng.randrange(len(bodies))
                if rng.random() < 0.25:
                    try:
                        async with asyncio.timeout(rng.random() / 2):
                            await ask(client, CHAT, bodies[place])
                    except TimeoutError:
                        return
                else:
                    same(await ask(client, CHAT, bodies[place]), expected[place])
                complete += 1

        before = await two.idle("tiny", PATIENCE)
        await asyncio.gather(*(one() for _ in range(500)))
        after = await two.idle("tiny", PATIENCE)
    assert complete >= 375
    assert after["restarts"] == before["restarts"]
    assert after["kv_bytes"] == 0
    print(f"{complete} of 500 answered")


async def test_all_ranks_end_with_the_front(tmp_path: Path, model: Path) -> None:
    server_home = tmp_path / "home"
    with serving(server_home, "--model", str(model), "--ranks", "2", **SETTINGS) as server:
        ranks = [psutil.Process(pid) for pid in await ranks_of(server)]
        async with server.client(timeout=300) as client:
            streams = [asyncio.create_task(ask(client, CHAT, body)) for body in asked(2000)]
            await busy(server)
            server.process.kill()
            await asyncio.wait(streams)
        _, left = psutil.wait_procs(ranks, timeout=2.0)
        assert not left
        assert all(stream.exception() is not None for stream in streams)


async def test_a_model_that_cannot_be_divided_fails_with_one_line(
    tmp_path: Path, model: Path
) -> None:
    dirs = {"model_dirs": [str(model.parent)], "ranks_by_model": {"tiny": 3}}
    with serving(tmp_path / "home", **dirs) as server:
        async with server.client(timeout=60) as client:
            answer = await client.post(CHAT, json=chat("tiny"))
        assert answer.status_code == 503
        assert "3 ranks cannot share its 4 attention heads" in answer.json()["error"]["message"]
        state = (await server.models())["tiny"]
        assert state["state"] == "failed"
        assert "it can be divided among 2" in state["reason"]
        assert not server.engines()


async def busy(server: Server) -> None:
    async def there() -> bool:
        return bool((await server.models())["tiny"]["running"])

    await until(there, PATIENCE)
