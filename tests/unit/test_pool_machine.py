"""Whatever clients, operators and accidents do, in whatever order: requests end well, the budget
holds."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlx_server.engine.protocol import Generate
from mlx_server.errors import BadRequest
from mlx_server.models.pool import supervisor
from tests.support.pool import LIVELY, NAMES, Pool, local_pool, need_of, three_models

MODELS = st.sampled_from(NAMES)
MAX_OPEN = 12
MAX_CRASHES = 2
"""A third would be blamed on a request."""
TICKS = 5


class PoolMachine(RuleBasedStateMachine):
    """Starts requests and changes of the pool, and lets them overlap as Hypothesis likes.

    Engines load and generate when a rule says so, or all at once in the end.
    """

    models: ClassVar[Path]
    room: ClassVar[float]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory()
        self.stack = AsyncExitStack()
        self.open: list[asyncio.Task[None]] = []
        self.crashes = 0
        self.pool: Pool = self.runner.run(self._start())

    async def _start(self) -> Pool:
        budget = self.room * need_of(self.models / "a")
        pool = await self.stack.enter_async_context(
            local_pool(Path(self.folder.name), self.models, budget)
        )
        pool.fleet.works = False
        return pool

    def do(self, change: Callable[[], object] = lambda: None) -> None:
        """Make `change` in the loop, and let what follows from it happen for a while."""

        async def run() -> None:
            change()
            for _ in range(TICKS):
                await asyncio.sleep(0)

        self.runner.run(run())

    def begin(self, task: Coroutine[Any, Any, None]) -> None:
        self.do(lambda: self.open.append(asyncio.create_task(task)))

    @precondition(lambda self: len(self.open) < MAX_OPEN)
    @rule(name=MODELS, tokens=st.sampled_from([1, 30]), keep_alive=st.sampled_from([None, 0]))
    def ask(self, name: str, tokens: int, keep_alive: float | None) -> None:
        self.begin(self._ask(name, tokens, keep_alive))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, MAX_OPEN))
    def leave(self, which: int) -> None:
        task = self.open.pop(which % len(self.open))
        self.do(task.cancel)

    @precondition(lambda self: len(self.open) < MAX_OPEN)
    @rule(name=MODELS)
    def load(self, name: str) -> None:
        self.begin(self._operate(self.pool.manager.load(name)))

    @precondition(lambda self: len(self.open) < MAX_OPEN)
    @rule(name=MODELS)
    def unload(self, name: str) -> None:
        self.begin(self._operate(self.pool.manager.unload(name)))

    @rule()
    def hold_loads(self) -> None:
        self.pool.fleet.may_load.clear()

    @rule()
    def let_loads_go_on(self) -> None:
        self.do(self.pool.fleet.may_load.set)

    @rule()
    def generate(self) -> None:
        self.do(self._generate)

    @precondition(lambda self: self.crashes < MAX_CRASHES)
    @rule(which=st.integers(0, 3))
    def crash(self, which: int) -> None:
        self.crashes += 1
        loaded = [e for e in self.pool.fleet.running if e.load and e.received]
        if loaded:
            self.do(loaded[which % len(loaded)].crash)

    @precondition(lambda self: self.open)
    @rule()
    def see_the_oldest_end(self) -> None:
        task = self.open.pop(0)
        self.runner.run(self._see_end([task]))

    @invariant()
    def the_budget_holds(self) -> None:
        statuses = self.pool.manager.statuses()
        held = [status for status in statuses if status.state not in ("absent", "failed")]
        assert self.pool.reserved <= self.pool.budget
        assert len(self.pool.fleet.running) <= len(held)
        assert not [status for status in statuses if status.state == "failed"]

    def teardown(self) -> None:
        try:
            self.runner.run(self._see_end(self.open))
            self.runner.run(self.stack.aclose())
        finally:
            self.runner.close()
            self.folder.cleanup()

    def _generate(self) -> None:
        for engine in self.pool.fleet.running:
            for id_, request in list(engine.open.items()):
                assert isinstance(request, Generate)
                engine.begin(id_)
                engine.step(id_, request.max_tokens)

    async def _see_end(self, tasks: list[asyncio.Task[None]]) -> None:
        """Let everything go on until these have ended, and fail as they do."""
        self.pool.fleet.may_load.set()
        async with asyncio.timeout(LIVELY):
            while not all(task.done() for task in tasks):
                self._generate()
                await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)

    async def _ask(self, name: str, tokens: int, keep_alive: float | None) -> None:
        got = await self.pool.ask(name, tokens, keep_alive)
        assert got == list(range(3, 3 + tokens))

    async def _operate(self, change: Coroutine[Any, Any, object]) -> None:
        try:
            await change
        except BadRequest as error:
            if "still loading" not in error.message:
                raise


def play(models: Path, room: float, games: int, moves: int) -> None:
    """Let Hypothesis play so many games in pools that have room for `room` models."""
    PoolMachine.models = models
    PoolMachine.room = room
    checks = settings(
        max_examples=games,
        stateful_step_count=moves,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    run_state_machine_as_test(PoolMachine, settings=checks)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_models(tmp_path_factory.mktemp("machine") / "models")


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MIN_DELAY", 0.001)
    monkeypatch.setattr(supervisor, "MAX_DELAY", 0.004)


@pytest.mark.parametrize("room", [1.5, 2.2])
def test_no_order_of_events_breaks_the_pool(models: Path, room: float) -> None:
    play(models, room, games=30, moves=40)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("room", [1.5, 2.2, 3.5])
def test_no_order_of_events_breaks_the_pool_for_long(models: Path, room: float) -> None:
    play(models, room, games=200, moves=60)
