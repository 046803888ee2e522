"""Engines that end or hang are replaced, requests go on, and a guilty one fails alone."""

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_server.engine import client as client_module
from mlx_server.engine.client import Elsewhere, EngineClient
from mlx_server.engine.protocol import Embed, Generate, LoadOptions, Row, Sampling, Stop, Tokens
from mlx_server.errors import EngineFailed, LoadCrashed, ModelLoadFailed, Unavailable
from mlx_server.models.pool import supervisor as supervisor_module
from mlx_server.models.pool.open_requests import RESUMED_PRIORITY
from mlx_server.models.pool.resumable import ResumableEngine
from mlx_server.models.pool.stream import RowStream
from mlx_server.models.pool.supervisor import KV_SHARE_AFTER_KILL, EngineSupervisor, _delay
from tests.support.engines import CRASH, Fleet, ScriptedEngine, stats
from tests.support.pool import settled

PROMPT = [0, 1, 2]


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "MIN_DELAY", 0.001)


@dataclass
class Supervised:
    """A scripted engine under supervision."""

    engine: ResumableEngine
    supervisor: EngineSupervisor
    fleet: Fleet
    run: asyncio.Task[None]
    kv_shares: list[float]
    wanted: bool = True
    readers: list["Reader"] = field(default_factory=list)

    @property
    def process(self) -> ScriptedEngine:
        return self.fleet.engines[-1]

    def ask(self, tokens: int = 5, **more: Any) -> "Reader":
        prompt = more.pop("prompt", PROMPT)
        request = Generate(0, prompt, Sampling(), tokens, **more)
        return self.read(self.engine.generate([request], "the request's id"))

    def read(self, stream: RowStream) -> "Reader":
        self.readers.append(Reader(stream))
        return self.readers[-1]

    async def replaced(self) -> None:
        """Wait until another process works."""
        before = self.supervisor.restarts
        await settled(lambda: self.supervisor.restarts > before)

    async def has(self, count: int) -> None:
        """Wait until the present process holds so many requests."""
        await settled(lambda: len(self.process.open) == count)


class Reader:
    """Reads a stream in the background."""

    def __init__(self, stream: RowStream) -> None:
        self.stream = stream
        self.rows: list[Row] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> list[int]:
        with self.stream:
            async for _, row in self.stream.rows():
                self.rows.append(row)
        return self.tokens

    @property
    def tokens(self) -> list[int]:
        return [token for row in self.rows for token in row.tokens]

    async def got(self, count: int) -> None:
        await settled(lambda: len(self.tokens) >= count)


@asynccontextmanager
async def supervised(
    works: bool = False,
    hang_timeout: float = 60,
    elsewhere: Callable[[], "Elsewhere | None"] = lambda: None,
) -> AsyncIterator[Supervised]:
    fleet = Fleet(works=works)
    shares: list[float] = []

    async def start(kv_share: float) -> EngineClient:
        shares.append(kv_share)
        options = LoadOptions(kv_limit=1)
        return await fleet.start("scripted", Path("scripted"), options, elsewhere=elsewhere())

    engine = ResumableEngine("scripted")
    supervisor = EngineSupervisor(await start(1.0), engine.replicas[0], start, hang_timeout)
    run = asyncio.create_task(supervisor.run(wanted=lambda: one.wanted))
    one = Supervised(engine, supervisor, fleet, run, shares)
    try:
        yield one
    finally:
        run.cancel()
        await asyncio.wait([run])
        await supervisor.stop()
        await asyncio.gather(*(reader.task for reader in one.readers), return_exceptions=True)
        assert not fleet.running


def ids(process: ScriptedEngine) -> list[int]:
    return sorted(process.open)


# requests go on


async def test_a_generation_goes_on_where_it_was() -> None:
    async with supervised() as one:
        reader = one.ask(5)
        await one.has(1)
        one.process.begin(0)
        one.process.step(0, 2)
        await reader.got(2)
        one.process.crash()
        await one.replaced()
        await one.has(1)
        [resumed] = one.process.received
        assert isinstance(resumed, Generate)
        assert (resumed.prompt, resumed.generated, resumed.max_tokens) == ([*PROMPT, 3, 4], 2, 3)
        assert resumed.priority == RESUMED_PRIORITY
        one.process.step(0, 3)
        assert await reader.task == [3, 4, 5, 6, 7]


async def test_what_had_not_begun_keeps_its_place_behind_what_had() -> None:
    async with supervised() as one:
        one.ask(priority=3), one.ask(priority=3)
        await one.has(2)
        one.process.begin(0)
        await settled(lambda: one.engine._open[0].begun)
        one.process.crash()
        await one.replaced()
        await one.has(2)
        priorities = {request.id: request.priority for request in one.process.received}
        assert priorities == {0: RESUMED_PRIORITY, 1: 3}


async def test_a_generation_that_lacked_only_its_finish_is_finished() -> None:
    async with supervised() as one:
        reader = one.ask(2)
        await one.has(1)
        one.process.begin(0)
        one.process.send(Tokens([Row(0, [3]), Row(0, [4])]))
        await reader.got(2)
        one.process.crash()
        assert await reader.task == [3, 4]
        assert reader.rows[-1].finish == "length"


async def test_figures_of_the_cache_are_told_once() -> None:
    async with supervised() as one:
        reader = one.ask(3, prompt_logprobs=1)
        await one.has(1)
        one.process.send(Tokens([Row(0, [3], cached=1)]))
        await reader.got(1)
        one.process.crash()
        await one.replaced()
        await one.has(1)
        [resumed] = one.process.received
        assert isinstance(resumed, Generate)
        assert resumed.prompt_logprobs is None
        one.process.send(Tokens([Row(0, [4], cached=4), Row(0, [5], "length")]))
        await reader.task
        assert [row.cached for row in reader.rows] == [1, None, None]


async def test_the_next_engine_makes_the_vectors_that_the_last_one_did_not() -> None:
    async with supervised() as one:
        reader = one.read(one.engine.embed(Embed(0, [[1], [2], [3]]), "vectors"))
        await one.has(1)
        one.process.send(Tokens([Row(0, [], vectors=[(1, b"b")])]))
        await settled(lambda: reader.rows)
        one.process.crash()
        await one.replaced()
        await one.has(1)
        [rest] = one.process.received
        assert isinstance(rest, Embed)
        assert rest.texts == [[1], [], [3]]
        one.process.send(Tokens([Row(0, [], "stop", vectors=[(0, b"a"), (2, b"c")])]))
        await reader.task


async def test_requests_that_come_between_two_engines_wait_for_the_next() -> None:
    async with supervised() as one:
        one.fleet.may_load.clear()
        one.process.crash()
        await settled(lambda: one.supervisor.restarting)
        assert (one.supervisor.pid, one.supervisor.stats) == (None, None)
        reader = one.ask(2)
        assert one.engine.in_flight == 1
        one.fleet.works = True
        one.fleet.may_load.set()
        assert await reader.task == [3, 4]
        assert (one.supervisor.restarting, one.supervisor.restarts) == (False, 1)


async def test_what_is_given_up_between_two_engines_is_not_sent_again() -> None:
    async with supervised() as one:
        reader = one.ask()
        await one.has(1)
        one.fleet.may_load.clear()
        one.process.crash()
        await settled(lambda: one.supervisor.restarting)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        one.fleet.may_load.set()
        await settled(lambda: not one.supervisor.restarting)
        assert one.engine.in_flight == 0
        assert one.process.received == []


async def test_a_paused_request_goes_on_under_another_name() -> None:
    async with supervised() as one:
        reader = one.ask(4)
        await one.has(1)
        one.process.begin(0)
        one.process.step(0, 2)
        await reader.got(2)
        one.engine.pause([0])
        await one.has(0)
        one.process.send(Tokens([Row(0, [99])]))  # it was on its way
        one.engine.resume([0])
        await one.has(1)
        [id_] = ids(one.process)
        assert id_ != 0
        one.process.step(id_, 2)
        assert await reader.task == [3, 4, 5, 6]


async def test_a_paused_request_is_not_sent_to_the_next_engine_before_it_is_resumed() -> None:
    async with supervised() as one:
        reader = one.ask(2)
        await one.has(1)
        one.engine.pause([0])
        one.process.crash()
        await one.replaced()
        one.fleet.works = True
        assert await one.ask(1).task == [3]
        assert not reader.task.done()
        one.engine.resume([0])
        assert await reader.task == [3, 4]


# the guilty


async def poisoned(one: Supervised) -> Reader:
    one.fleet.poison = 77
    return one.ask(prompt=[77])


async def test_a_request_that_keeps_ending_engines_fails_alone_after_three_deaths() -> None:
    async with supervised(works=True) as one:
        guilty = await poisoned(one)
        with pytest.raises(EngineFailed, match="the request's id"):
            await guilty.task
        assert len(one.fleet.engines) <= 4
        assert await one.ask(2).task == [3, 4]


async def test_bystanders_are_answered_after_the_guilty_was_tried_alone() -> None:
    async with supervised() as one:
        one.fleet.poison = 77
        bystander, guilty = one.ask(2), one.ask(2, prompt=[77])
        for _ in range(2):
            await one.has(2)
            one.process.begin(0, 1)
            await settled(lambda: one.engine._open[1].begun)
            one.process.crash()
            await one.replaced()
        # Both are suspects now, and are tried one after the other, the first one first.
        await one.has(1)
        assert ids(one.process) == [0]
        one.process.step(0, 2)
        assert await bystander.task == [3, 4]
        await settled(lambda: ids(one.process) == [1])
        one.process.begin(1)
        await settled(lambda: one.engine._open[1].begun)
        one.process.crash()
        with pytest.raises(EngineFailed):
            await guilty.task


async def test_only_what_had_begun_is_blamed() -> None:
    async with supervised() as one:
        one.ask(), one.ask()
        await one.has(2)
        one.process.begin(1)
        await settled(lambda: one.engine._open[1].begun)
        one.process.crash()
        await one.replaced()
        assert [request.evidence for request in one.engine._open.values()] == [0, 2]


async def test_what_was_sent_is_blamed_if_nothing_had_begun() -> None:
    async with supervised() as one:
        one.ask()
        await one.has(1)
        one.process.crash()
        await one.replaced()
        assert [request.evidence for request in one.engine._open.values()] == [2]


async def test_a_kill_from_outside_counts_half_of_a_crash_and_halves_the_kv_share() -> None:
    async with supervised() as one:
        one.ask()
        await one.has(1)
        one.process.crash(-signal.SIGKILL)
        await one.replaced()
        assert [request.evidence for request in one.engine._open.values()] == [1]
        await one.has(1)
        one.process.crash(-signal.SIGSEGV)
        await one.replaced()
        assert one.kv_shares == [1.0, KV_SHARE_AFTER_KILL, 1.0]


async def test_progress_clears_a_request() -> None:
    async with supervised() as one:
        reader = one.ask(3)
        for _ in range(3):
            await one.has(1)
            one.process.begin(0)
            one.process.step(0, 1)
            await reader.got(len(one.fleet.engines))
            if not reader.task.done() and len(reader.tokens) < 3:
                one.process.crash()
                await one.replaced()
        assert await reader.task == [3, 4, 5]


# processes


async def test_an_engine_that_nobody_wants_is_not_replaced() -> None:
    async with supervised() as one:
        one.wanted = False
        one.process.crash(says="out of luck")
        await one.run
        assert len(one.fleet.engines) == 1
        assert one.supervisor.last_lines == ("out of luck",)


async def test_a_load_that_crashes_is_tried_again() -> None:
    async with supervised() as one:
        reader = one.ask(2)
        await one.has(1)
        one.fleet.outcomes["scripted"] = deque([CRASH, CRASH])
        one.fleet.works = True
        one.process.crash()
        assert await reader.task == [3, 4]
        assert one.supervisor.restarts == 1


@pytest.mark.parametrize(
    ("outcomes", "error"), [([CRASH] * 3, LoadCrashed), (["no such type"], ModelLoadFailed)]
)
async def test_a_model_that_cannot_be_loaded_again_is_given_up(
    outcomes: list[str | None], error: type[Exception]
) -> None:
    async with supervised() as one:
        one.fleet.outcomes["scripted"] = deque(outcomes)
        one.process.crash()
        with pytest.raises(error):
            await one.run
        assert len(one.fleet.engines) == 1 + len(outcomes)
        if error is LoadCrashed:
            assert one.supervisor.last_lines == ("no way to load this",)


async def test_an_engine_that_is_silent_over_its_work_is_replaced() -> None:
    async with supervised(hang_timeout=0.05) as one:
        reader = one.ask(2)
        await one.has(1)
        hung = one.process
        one.fleet.works = True
        assert await reader.task == [3, 4]
        assert hung.process.returncode == -signal.SIGKILL
        assert one.kv_shares == [1.0, 1.0], "nobody killed it for its memory"


async def test_an_idle_engine_may_be_silent() -> None:
    async with supervised(hang_timeout=0.02) as one:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.shield(one.run)
        assert one.process.running


async def test_an_engine_with_long_turns_may_be_silent_for_longer() -> None:
    async with supervised(hang_timeout=0.02) as one:
        one.process.send(stats(longest_turn=1.0))
        await settled(lambda: one.supervisor.stats is not None)
        assert one.supervisor._patience() == 20.0


def test_delays_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "MIN_DELAY", 0.25)
    assert [_delay(failures) for failures in range(5)] == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert _delay(1000) == 30.0


async def test_all_fail_when_the_model_is_stopped() -> None:
    async with supervised() as one:
        reader = one.ask()
        await one.has(1)
        one.run.cancel()
        await asyncio.wait([one.run])
        await one.supervisor.stop()
        with pytest.raises(Unavailable, match="being stopped"):
            await reader.task
        with pytest.raises(Unavailable, match="being stopped"):
            one.ask()
        assert one.fleet.engines[0].process.returncode == 0


# stopping


class Reluctant(ScriptedEngine):
    """Ends a moment after it is told to."""

    async def _handle(self, message: object) -> None:
        if isinstance(message, Stop):
            await asyncio.sleep(0.2)
        await super()._handle(message)


@pytest.mark.parametrize(
    ("device", "how"), [("metal", "exit code 0"), ("cuda", "signal 9"), ("cpu", "signal 9")]
)
async def test_an_engine_on_metal_gets_longer_to_end_before_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, how: str
) -> None:
    monkeypatch.setattr(client_module, "STOP_SECONDS", 0.01)
    assert client_module.METAL_STOP_SECONDS == 30.0
    monkeypatch.setattr("tests.support.engines.ScriptedEngine", Reluctant)
    fleet = Fleet(device=device)
    engine = await fleet.start("scripted", tmp_path, LoadOptions(kv_limit=1))
    await engine.stop()
    assert engine.how_it_ended == how


# ranks on other machines


class OneElsewhere:
    """A rank on a machine that goes when `go` is called, or is killed there."""

    hosts = ()
    sockets = ()
    fabric = None

    def __init__(self) -> None:
        self.lost_host: str | None = None
        self.killed = False
        self.released = False
        self._lost = asyncio.Event()

    def go(self) -> None:
        self.lost_host = "second"
        self._lost.set()

    async def until_lost(self) -> None:
        await self._lost.wait()

    async def heard(self) -> None: ...

    def close_sockets(self) -> None: ...

    def release(self) -> None:
        self.released = True


async def test_the_loss_of_a_machine_ends_the_engine_and_is_no_requests_fault() -> None:
    made: list[OneElsewhere] = []

    def elsewhere() -> OneElsewhere:
        made.append(OneElsewhere())
        return made[-1]

    async with supervised(elsewhere=elsewhere) as one:
        reader = one.ask(10)
        for _ in range(9):  # as often as would be enough to find any request guilty
            await one.has(1)
            one.process.begin(*one.process.open)
            one.process.step(*one.process.open)
            await reader.got(len(made))
            made[-1].go()
            await one.replaced()
        assert all(each.released for each in made[:-1])
        assert set(one.kv_shares) == {1.0}
        await one.has(1)
        one.process.step(*one.process.open)
        assert await reader.task == list(range(3, 13))


async def test_a_rank_elsewhere_that_was_killed_counts_as_a_kill() -> None:
    made: list[OneElsewhere] = []

    def elsewhere() -> OneElsewhere:
        made.append(OneElsewhere())
        return made[-1]

    async with supervised(elsewhere=elsewhere) as one:
        one.ask(5)
        await one.has(1)
        made[-1].killed = True
        one.process.crash(GONE_CODE)
        await one.replaced()
        assert one.kv_shares == [1.0, KV_SHARE_AFTER_KILL]


GONE_CODE = 71


async def test_a_load_that_loses_a_machine_names_it(tmp_path: Path) -> None:
    fleet = Fleet()
    fleet.may_load.clear()
    there = OneElsewhere()
    starting = asyncio.create_task(
        fleet.start("scripted", tmp_path, LoadOptions(kv_limit=1), elsewhere=there)
    )
    await settled(lambda: fleet.engines)
    there.go()
    with pytest.raises(LoadCrashed, match="host `second` went away while the model was loading"):
        await starting
    assert there.released
    assert not fleet.running
