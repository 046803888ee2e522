"""One model served by several engines: who gets a request, and what becomes of it; no arrays."""

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Generate, LoadOptions, Row, Sampling
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.pool import supervisor
from mlx_server.models.pool.resumable import ResumableEngine
from mlx_server.models.pool.routing import MOST_MARKS, SentPrefixes, cheapest, marks
from mlx_server.models.pool.stream import RowStream
from mlx_server.models.pool.supervisor import MAX_LOAD_ATTEMPTS, EngineSupervisor
from mlx_server.models.pool.supervisors import Supervisors
from tests.support.engines import CRASH, Fleet, ScriptedEngine
from tests.support.pool import KV, local_pool, need_of, settled, three_models

LONG = list(range(1000))
"""A prompt worth going out of the way for."""


class Replicas:
    """Two scripted engines of one model, and how to ask it things."""

    def __init__(self, engine: ResumableEngine, supervisors: Supervisors, fleet: Fleet) -> None:
        self.engine = engine
        self.supervisors = supervisors
        self.fleet = fleet
        self.readers: list[asyncio.Task[list[Row]]] = []

    def ask(self, prompt: list[int], tokens: int = 5) -> asyncio.Task[list[Row]]:
        stream = self.engine.generate([Generate(0, prompt, Sampling(), tokens)], "asked")
        reader = asyncio.create_task(_read(stream))
        self.readers.append(reader)
        return reader

    def of(self, index: int) -> ScriptedEngine:
        process = self.engine.replicas[index].process
        assert process is not None
        return self.fleet.of(process.pid)

    async def hold(self, *counts: int) -> None:
        """Wait until the engines have so many requests."""
        await settled(
            lambda: (
                all(r.process is not None for r in self.engine.replicas)
                and [len(self.of(i).open) for i in range(len(counts))] == list(counts)
            )
        )


async def _read(stream: RowStream) -> list[Row]:
    with stream:
        return [row async for _, row in stream.rows()]


@asynccontextmanager
async def two(works: bool = False) -> AsyncIterator[Replicas]:
    fleet = Fleet(works=works)

    async def start(_: float) -> EngineClient:
        return await fleet.start("scripted", Path("scripted"), LoadOptions(kv_limit=1))

    engine = ResumableEngine("scripted", replicas=2)
    supervisors = Supervisors(
        engine, [EngineSupervisor(await start(1.0), one, start, 60) for one in engine.replicas]
    )
    run = asyncio.create_task(supervisors.run(wanted=lambda: False))
    replicas = Replicas(engine, supervisors, fleet)
    try:
        yield replicas
    finally:
        run.cancel()
        await asyncio.wait([run])
        await supervisors.stop()
        await asyncio.gather(*replicas.readers, return_exceptions=True)
        assert not fleet.running


async def test_requests_spread_over_the_engines() -> None:
    async with two() as both:
        for i in range(6):
            both.ask([i] * 40)
        await both.hold(3, 3)


async def test_a_prompt_goes_where_its_beginning_was_sent_though_others_wait_there() -> None:
    async with two() as both:
        both.ask(LONG)
        both.ask([7])
        await both.hold(1, 1)
        both.ask([*LONG, 1, 2, 3])
        both.ask([*LONG[:900], 5])
        await both.hold(3, 1)


async def test_a_common_beginning_does_not_keep_an_engine_idle() -> None:
    async with two() as both:
        for i in range(8):
            both.ask([*LONG[:200], i, i])
        await settled(lambda: sum(len(both.of(i).open) for i in range(2)) == 8)
        assert min(len(both.of(i).open) for i in range(2)) >= 3


async def test_requests_of_an_engine_that_ends_go_on_at_once_in_the_other() -> None:
    async with two() as both:
        readers = [both.ask([i] * 40) for i in range(4)]
        await both.hold(2, 2)
        dying, staying = both.of(0), both.of(1)
        for id_ in list(dying.open):
            dying.begin(id_)
            dying.step(id_, 2)
        await settled(lambda: sum(len(r.requests) for r in both.engine.replicas) == 4)
        dying.crash(-signal.SIGKILL)
        await settled(lambda: len(staying.open) == 4)
        for id_ in list(staying.open):
            staying.step(id_, staying.open[id_].max_tokens)  # type: ignore[union-attr]
        for rows in await asyncio.gather(*readers):
            assert [token for row in rows for token in row.tokens] == list(range(40, 45))


async def test_an_engine_that_came_back_gets_requests_but_not_for_what_it_has_lost() -> None:
    async with two() as both:
        both.ask(LONG)
        both.ask([7])
        await both.hold(1, 1)
        both.of(0).crash()
        await both.hold(0, 2)
        both.ask([*LONG, 1])
        await both.hold(0, 3)
        both.ask([8])
        await both.hold(1, 3)
        statuses = both.supervisors.replicas
        assert [(one.state, one.in_flight, one.restarts) for one in statuses] == [
            ("ready", 1, 1),
            ("ready", 3, 0),
        ]


async def test_the_other_engine_serves_alone_when_one_can_not_be_loaded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "MIN_DELAY", 0.01)
    async with two(works=True) as both:
        both.fleet.outcomes["scripted"] = deque([CRASH] * MAX_LOAD_ATTEMPTS)
        both.of(0).crash()
        await settled(lambda: both.engine.replicas[0].given_up)
        rows = await both.ask([1, 2, 3])
        assert [token for row in rows for token in row.tokens] == [3, 4, 5, 6, 7]
        assert [one.state for one in both.supervisors.replicas] == ["failed", "ready"]
        assert not both.supervisors.restarting


class Late:
    """Two engines, of which the second comes, or fails, when its machine is there."""

    def __init__(self, fleet: Fleet) -> None:
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.engine = ResumableEngine("scripted", replicas=2)
        self.fleet = fleet

    async def first(self, _: float) -> EngineClient:
        return await self.fleet.start("scripted", Path("scripted"), LoadOptions(kv_limit=1))

    async def second(self, share: float) -> EngineClient:
        await self.outcome
        return await self.first(share)

    async def supervisors(self) -> Supervisors:
        here, there = self.engine.replicas
        return Supervisors(
            self.engine,
            [
                EngineSupervisor(await self.first(1.0), here, self.first, 60),
                EngineSupervisor(None, there, self.second, 60, host="second"),
            ],
        )

    async def ask(self, prompt: list[int]) -> list[int]:
        stream = self.engine.generate([Generate(0, prompt, Sampling(), 5)], "asked")
        return [token for row in await _read(stream) for token in row.tokens]


@asynccontextmanager
async def late() -> AsyncIterator[tuple[Late, Supervisors]]:
    made = Late(Fleet(works=True))
    supervisors = await made.supervisors()
    run = asyncio.create_task(supervisors.run(wanted=lambda: False))
    try:
        yield made, supervisors
    finally:
        run.cancel()
        await asyncio.wait([run])
        await supervisors.stop()
        assert not made.fleet.running


async def test_an_engine_whose_machine_comes_later_gets_requests_then() -> None:
    async with late() as (made, supervisors):
        assert await made.ask([1] * 40) == list(range(40, 45))
        [_, there] = supervisors.replicas
        assert (there.state, there.host, there.pid) == ("restarting", "second", None)
        assert not supervisors.restarting
        made.outcome.set_result(None)
        await settled(lambda: made.engine.replicas[1].process is not None)
        for i in range(4):
            await made.ask([i] * 40)
        assert [one.sent_count for one in made.engine.replicas] == [3, 2]
        assert [(one.state, one.restarts) for one in supervisors.replicas] == [("ready", 0)] * 2


async def test_a_machine_that_refuses_leaves_its_engine_failed_and_the_reason_known() -> None:
    async with late() as (made, supervisors):
        made.outcome.set_exception(ModelLoadFailed("host `second`: the model is not there"))
        await settled(lambda: made.engine.replicas[1].given_up)
        [here, there] = supervisors.replicas
        assert (here.state, here.reason) == ("ready", None)
        assert there.state == "failed"
        assert there.reason == "host `second`: the model is not there"
        assert await made.ask([1] * 40) == list(range(40, 45))


async def test_a_request_that_ends_engines_fails_alone() -> None:
    async with two() as both:
        guilty = both.ask(LONG)
        await both.hold(1, 0)
        innocent = both.ask([7])
        await both.hold(1, 1)
        while not guilty.done():
            await settled(lambda: guilty.done() or any(0 in e.open for e in both.fleet.running))
            for engine in both.fleet.running:
                if 0 in engine.open:
                    engine.begin(0)
                    engine.crash()
        assert "Quote this id" in str(guilty.exception())
        await settled(lambda: any(1 in engine.open for engine in both.fleet.running))
        [holder] = [engine for engine in both.fleet.running if 1 in engine.open]
        holder.begin(1)
        holder.step(1, 5)
        assert [token for row in await innocent for token in row.tokens] == list(range(1, 6))


async def test_memory_is_reserved_for_every_engine(tmp_path: Path) -> None:
    models = three_models(tmp_path / "models")
    need = need_of(models / "a")
    async with local_pool(tmp_path, models, 2.5 * need, replicas_by_model={"a": 2}) as pool:
        assert await pool.ask("a") == [3, 4, 5]
        assert len(pool.fleet.running) == 2
        assert pool.reserved == 2 * need - KV, "they share the memory for KV caches"
        assert await pool.ask("b") == [3, 4, 5]
        assert pool.loaded == {"b"}, "there was no room beside two engines"


def test_marks_agree_as_far_as_prompts_do() -> None:
    one, other = marks(LONG), marks([*LONG[:600], *LONG[:400]])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 16 + [False]
    assert [mark.tokens for mark in marks(LONG[:100])] == [32, 64, 96]
    assert marks(LONG[:31]) == []


def test_what_was_sent_is_forgotten_beyond_a_bound_ends_of_prompts_first() -> None:
    sent = SentPrefixes()
    sent.add(marks(LONG))
    for i in range(MOST_MARKS - len(marks(LONG)) + 1):
        sent.add(marks([i + 1] * 32))
    assert 0 < sent.known(marks(LONG)) < 1000


def test_the_cheapest_engine_is_the_one_with_least_to_compute() -> None:
    known, load = {"a": 1000, "b": 0}, {"a": 3, "b": 0}
    assert cheapest(["a", "b"], known.__getitem__, load.__getitem__) == "a"
    load["a"] = 9
    assert cheapest(["a", "b"], known.__getitem__, load.__getitem__) == "b"
