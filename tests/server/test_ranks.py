"""A model divided among two processes behind a real server: whatever ends, no stream notices."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server import CHAT, Answer, Server, ask, chat, logged, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_model

FEW, MANY = 4, 8
"""Streams at a time."""
PATIENCE = 60.0
HANG_SECONDS = 3.0
TINY, LAYERED = "tiny", "layered"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models in two ranks each. Of one, each has layers of its own, rank 0 the last two."""
    home = tmp_path_factory.mktemp("home")
    build_tiny_model(home / "models" / TINY, context=4096)
    layers = {"layers": 3, "model_type": "qwen2"}
    build_tiny_model(home / "models" / LAYERED, "qwen", context=4096, **layers)
    flags = ("--model", TINY, "--model", LAYERED, "--ranks", "2")
    own = SETTINGS | {"division_by_model": {LAYERED: "pipeline"}}
    with serving(home, *flags, may_hang=True, steps_may_fail=True, **own) as server:
        yield server


SETTINGS: dict[str, Any] = {"prefix_cache": "0", "hang_timeout": HANG_SECONDS}
"""Nothing is kept, so that usage repeats."""


def asked(tokens: int, model: str = TINY, streams: int = FEW) -> list[dict[str, Any]]:
    """Streams, half of them greedy; all tell log-probabilities to judge a difference by."""
    bodies = []
    for i in range(streams):
        how = {"temperature": i % 2, "seed": i, "top_p": 0.9, "frequency_penalty": 0.3 * (i % 3)}
        messages = [{"role": "user", "content": "Tell me more. " * (i + 1)}]
        bodies.append(
            chat(model, max_tokens=tokens, ignore_eos=True, stream=True, **how)
            | {"messages": messages, "logprobs": True, "top_logprobs": 2}
            | {"stream_options": {"include_usage": True}}
        )
    return bodies


async def all_of(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(client, CHAT, body) for body in bodies)))


async def ranks_of(server: Server, other_than: Sequence[int] = (), model: str = TINY) -> list[int]:
    """Process ids of the model's ranks, once all are there and have said so."""
    found: list[int] = []
    state: dict[str, Any] = {}

    async def there() -> bool:
        nonlocal found, state
        state = (await server.models())[model]
        ranks = [rank for engine in state["replicas"] for rank in engine["ranks"]]
        found = [rank["pid"] for rank in ranks if rank["memory"]]
        return state["state"] == "ready" and len(found) == 2 and not set(found) & set(other_than)

    await until(there, PATIENCE, lambda: f"{other_than} were not replaced: {state}")
    return found


async def starts_of(server: Server, model: str) -> int:
    """How many engines the model has had; one that ends while nobody uses it is loaded anew."""
    state = (await server.models())[model]
    return int(state["restarts"] + state["loads"])


async def end_at_random(
    server: Server, kills: int, tokens: int, model: str = TINY, streams: int = FEW
) -> None:
    """Kill any rank again and again while streams run; all get the text that they get alone."""
    rng = random.Random(5)
    before = await starts_of(server, model)
    async with server.client(timeout=300) as client:
        bodies = asked(tokens, model, streams)
        expected = await all_of(client, bodies)
        answers = ties = 0
        ranks: list[int] = []
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
                ranks = await ranks_of(server, ranks, model)
                await asyncio.sleep(rng.random() / 2)  # at any moment
                os.kill(rng.choice(ranks), signal.SIGKILL)
            done.set()
    await server.idle(model, PATIENCE)
    await ranks_of(server, ranks, model)
    assert await starts_of(server, model) - before == kills
    print(f"{kills} kills, {answers} answers, {ties} near-ties")
    ends = logged(server.log.read_text(), "engine_ended")
    assert {one["how"] for one in ends} <= {"signal 9"}, "as the rank ended"
    assert ties <= 1 + answers // 4
    # The processes of an engine that has ended are gone: here are those of both models.
    assert len(server.engines()) == 2
    assert len([one for one in server.children() if is_rank(one)]) == 2


def is_rank(process: psutil.Process) -> bool:
    return "mlx_server.engine.follower" in process.cmdline()


async def test_killed_ranks_change_nothing_in_any_stream(two: Server) -> None:
    await end_at_random(two, kills=2, tokens=40)


async def test_killed_ranks_with_layers_of_their_own_change_nothing(two: Server) -> None:
    await end_at_random(two, kills=1, tokens=40, model=LAYERED)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_fifty_killed_ranks_change_nothing_in_any_stream(two: Server) -> None:
    await end_at_random(two, kills=50, tokens=400, streams=MANY)


async def test_a_stopped_rank_is_replaced_and_its_memory_freed(two: Server) -> None:
    bodies = asked(40)
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
    bodies = [
        body | {"max_tokens": tokens} for body in asked(0, streams=MANY) for tokens in (1, 20, 60)
    ]
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
