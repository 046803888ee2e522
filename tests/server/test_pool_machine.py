"""Whatever operators and clients do, in whatever order: requests end well, the budget holds."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import httpx
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

from tests.support.pool import LIVELY, NAMES, long, need_of, pool, three_models
from tests.support.server import CHAT, Server

MODELS = st.sampled_from(NAMES)
MOST_OPEN = 12


class PoolMachine(RuleBasedStateMachine):
    """Starts requests and changes of the pool, and lets them overlap as Hypothesis likes."""

    server: ClassVar[Server]
    budget: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.client = httpx.Client(base_url=self.server.url, timeout=2 * LIVELY, trust_env=False)
        self.threads = ThreadPoolExecutor(2 * MOST_OPEN)
        self.open: list[Future[None]] = []

    @precondition(lambda self: len(self.open) < MOST_OPEN)
    @rule(name=MODELS, tokens=st.sampled_from([1, 30, 300]), keep_alive=st.sampled_from([None, 0]))
    def ask(self, name: str, tokens: int, keep_alive: int | None) -> None:
        body = long(name, tokens, stream=False, keep_alive=keep_alive)
        self.open.append(self.threads.submit(self._ask, body))

    @precondition(lambda self: len(self.open) < MOST_OPEN)
    @rule(name=MODELS)
    def ask_and_leave(self, name: str) -> None:
        self.open.append(self.threads.submit(self._leave, long(name, 1500)))

    @precondition(lambda self: len(self.open) < MOST_OPEN)
    @rule(name=MODELS)
    def load(self, name: str) -> None:
        self.open.append(self.threads.submit(self._post, f"/admin/models/{name}/load", {200, 503}))

    @precondition(lambda self: len(self.open) < MOST_OPEN)
    @rule(name=MODELS)
    def unload(self, name: str) -> None:
        # A model that is loading cannot be unloaded.
        path = f"/admin/models/{name}/unload"
        self.open.append(self.threads.submit(self._post, path, {200, 400}))

    @precondition(lambda self: self.open)
    @rule()
    def see_the_oldest_end(self) -> None:
        self.open.pop(0).result(2 * LIVELY)

    @invariant()
    def the_budget_holds(self) -> None:
        models = self.client.get("/admin/models").json()["models"]
        held = [m for m in models if m["state"] not in ("absent", "failed")]
        assert sum(m["need"] for m in held) <= self.budget
        assert sum(m["memory"]["active"] for m in held if m["memory"]) <= self.budget
        assert not [m for m in models if m["state"] == "failed"]

    def teardown(self) -> None:
        for future in self.open:
            future.result(2 * LIVELY)
        self.threads.shutdown()
        self.client.close()

    def _ask(self, body: dict[str, object]) -> None:
        answer = self.client.post(CHAT, json=body)
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
        else:
            _is_documented(answer, {503})

    def _leave(self, body: dict[str, object]) -> None:
        with self.client.stream("POST", CHAT, json=body) as answer:
            if answer.status_code == 200:
                next(answer.iter_raw())

    def _post(self, path: str, allowed: set[int]) -> None:
        _is_documented(self.client.post(path), allowed)


def _is_documented(answer: httpx.Response, allowed: set[int]) -> None:
    assert answer.status_code in allowed, answer.text
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "model_loading", answer.text
        assert "retry-after" in answer.headers


def play(folder: Path, room: float, games: int, moves: int) -> None:
    """Let Hypothesis play so many games on a server whose budget is `room` models."""
    models = three_models(folder / "models")
    PoolMachine.budget = int(room * need_of(models / "a"))
    with pool(folder / "home", models, PoolMachine.budget) as server:
        PoolMachine.server = server
        checks = settings(
            max_examples=games,
            stateful_step_count=moves,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        run_state_machine_as_test(PoolMachine, settings=checks)


def test_no_order_of_events_breaks_the_pool(tmp_path: Path) -> None:
    play(tmp_path, room=1.5, games=3, moves=12)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("room", [1.5, 2.2])
def test_no_order_of_events_breaks_the_pool_for_long(tmp_path: Path, room: float) -> None:
    play(tmp_path, room, games=15, moves=40)
