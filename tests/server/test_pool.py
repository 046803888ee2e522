"""Many models behind one address, within one memory budget, with real engines over HTTP.

What the pool decides, and when, is shown in tests/unit/test_pool*.py.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mlx_server.models.pool.footprint import read_footprint
from tests.server.test_errors import assert_refused
from tests.support.pool import BATCH, LIVELY, NAMES, long, need_of, pool, short, three_models
from tests.support.server import CHAT, TEXT, Server, ask, until
from tests.support.tiny import build_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_models(tmp_path_factory.mktemp("pool") / "models")


@pytest.fixture(scope="module")
def need(models: Path) -> int:
    return need_of(models / "a")


def loads(states: dict[str, dict[str, Any]]) -> int:
    return sum(state["loads"] for state in states.values())


def loaded(states: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, state in states.items() if state["pid"]}


async def reaches(server: Server, check: Callable[[dict[str, Any]], object]) -> None:
    """Wait until `check` holds for what `GET /admin/models` says."""
    states: dict[str, Any] = {}

    async def look() -> bool:
        nonlocal states
        states = await server.models()
        return bool(check(states))

    await until(look, LIVELY, lambda: f"never: {states}")


@dataclass
class Ledger:
    """What the models took while the block ran, in bytes, at its most."""

    reserved: int = 0
    active: int = 0
    engines: int = 0
    states: set[str] = field(default_factory=set)


@asynccontextmanager
async def audited(server: Server) -> AsyncIterator[Ledger]:
    ledger = Ledger()

    async def audit() -> None:
        while True:
            states = (await server.models()).values()
            held = [s for s in states if s["state"] not in ("absent", "failed")]
            ledger.reserved = max(ledger.reserved, sum(s["need"] for s in held))
            active = sum(s["memory"]["active"] for s in held if s["memory"])
            ledger.active = max(ledger.active, active)
            ledger.engines = max(ledger.engines, len(held))
            ledger.states |= {s["state"] for s in states}
            await asyncio.sleep(0.05)

    auditor = asyncio.create_task(audit())
    try:
        yield ledger
    finally:
        auditor.cancel()
        done, _ = await asyncio.wait([auditor])
        assert all(task.cancelled() for task in done), done


async def get_503(client: httpx.AsyncClient, body: dict[str, Any], code: str) -> httpx.Response:
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == code
    assert int(answer.headers["retry-after"]) >= 1
    return answer


async def swap_at_random(server: Server, count: int, seed: int) -> dict[str, set[str]]:
    """Ask for one of three models at random, three requests at a time; returns their texts."""
    choose = random.Random(seed)
    names = iter([choose.choice(NAMES) for _ in range(count)])
    texts: dict[str, set[str]] = {name: set() for name in NAMES}

    async def worker(client: httpx.AsyncClient) -> None:
        for name in names:
            answer = await ask(client, CHAT, long(name, 60))
            assert (answer.done, answer.reason, answer.error) == (True, "length", None)
            texts[name].add(answer.text)

    async with server.client() as client, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(worker(client))
    return texts


async def churn(server: Server, swaps: int) -> None:
    """Load one model after the other, `swaps` times."""
    async with server.client() as client:
        for i in range(swaps):
            await ask(client, CHAT, short(NAMES[i % 3]))


async def flat_over(server: Server, swaps: int) -> None:
    front = psutil.Process(server.process.pid)
    await churn(server, 3)
    memory, files = front.memory_info().rss, front.num_fds()
    before = loads(await server.models())
    await churn(server, swaps)
    growth = front.memory_info().rss / memory - 1
    print(f"front {growth:+.2%} over {swaps} swaps")
    assert loads(await server.models()) - before == swaps
    assert abs(growth) <= 0.03
    assert front.num_fds() <= files + 2
    assert len(server.engines()) == 1


@pytest.mark.soak
async def test_sixty_swaps_leave_nothing_behind_in_the_front(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need) as server:
        await flat_over(server, 60)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, models: Path, need: int) -> Iterator[Server]:
    """A server with room for one of the models."""
    build_tiny_model(models / "large", hidden=512)
    with pool(tmp_path_factory.mktemp("small"), models, 1.5 * need, swap_interval=0) as server:
        yield server


async def test_models_are_loaded_on_demand_and_swapped_within_the_budget(
    small: Server, need: int
) -> None:
    async with audited(small) as ledger:
        texts = await swap_at_random(small, 6, seed=1)
    states = await small.models()
    assert 0 < ledger.active <= ledger.reserved <= int(1.5 * need)
    assert ledger.engines == 1
    assert [e.pid for e in small.engines()] == [states[n]["pid"] for n in loaded(states)]
    assert all(len(said) <= 1 for said in texts.values()), "an answer was cut or changed"
    await flat_over(small, 2)


async def test_a_request_for_many_prompts_does_not_wait_for_itself(small: Server) -> None:
    async with small.client() as client:
        bodies = [
            {"model": name, "prompt": ["word " * 200] * 8, "max_tokens": 2}
            for name in ("a", "b", "a", "b")
        ]
        async with asyncio.timeout(LIVELY):
            await asyncio.gather(*(ask(client, TEXT, body) for body in bodies))


async def test_a_client_that_hangs_up_leaves_the_line(small: Server) -> None:
    async with small.client() as client:
        held = asyncio.create_task(ask(client, CHAT, long("a", 1900)))
        await reaches(small, lambda s: s["a"]["running"])
        before = (await small.models())["b"]["loads"]
        leaving = asyncio.create_task(client.post(CHAT, json=short("b")))
        await reaches(small, lambda s: s["b"]["waiting_to_load"] == 1)
        leaving.cancel()
        await reaches(small, lambda s: s["b"]["waiting_to_load"] == 0)
        held.cancel()
        await asyncio.wait([held])
        await ask(client, CHAT, short("a"))  # whoever stood in the line would come before
        assert (await small.models())["b"]["loads"] == before


async def test_an_unloaded_model_gives_its_memory_back(small: Server) -> None:
    async with small.client() as client:
        await ask(client, CHAT, short("c"))
        [engine] = small.engines()
        answer = await client.post("/admin/models/c/unload")
        assert (answer.json()["state"], answer.json()["pid"]) == ("absent", None)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


async def test_an_engine_killed_while_it_loads_tells_those_who_wait(small: Server) -> None:
    async with small.client() as client:
        for _ in range(5):  # it may have loaded before it is found
            await client.post("/admin/models/b/unload")
            before = {engine.pid for engine in small.engines()}
            waiting = [asyncio.create_task(client.post(CHAT, json=short("b"))) for _ in range(2)]
            (await loading(small, before)).kill()
            answers = await asyncio.gather(*waiting)
            if all(answer.status_code == 503 for answer in answers):
                break
        for answer in answers:
            assert assert_refused(answer, 503)["code"] == "model_load_failed"
            assert "signal 9" in answer.text
        await ask(client, CHAT, short("b"))


async def loading(server: Server, before: set[int]) -> psutil.Process:
    """An engine that was not there before, as soon as there is one."""
    found: list[psutil.Process] = []

    async def begun() -> bool:
        nonlocal found
        found = [engine for engine in server.engines() if engine.pid not in before]
        return bool(found)

    await until(begun, LIVELY)
    return found[0]


async def test_what_can_never_fit_is_refused_with_both_figures(
    small: Server, models: Path, need: int
) -> None:
    async with small.client() as client:
        answer = await get_503(client, short("large"), "insufficient_memory")
    footprint = read_footprint(models / "large", True)
    least = footprint.weights + footprint.working(BATCH) + footprint.kv(2048)
    assert f"{least:,}" in answer.json()["error"]["message"]
    assert f"{int(1.5 * need):,}" in answer.json()["error"]["message"]


async def test_pinned_models_stay_and_a_full_queue_says_when_to_come_back(
    tmp_path: Path, models: Path, need: int
) -> None:
    pinned = {"pinned": ["a", "b"], "keep_alive": "0"}
    with pool(tmp_path, models, 2.5 * need, "--model", "a", max_queue=2, **pinned) as server:
        async with server.client() as client:
            await ask(client, CHAT, short("b"))
            refused = await get_503(client, short("c"), "insufficient_memory")
            assert f"{int(2.5 * need):,}" in refused.json()["error"]["message"]
            assert loaded(await server.models()) == {"a", "b"}
            await _fill_the_queue(server, client)


async def _fill_the_queue(server: Server, client: httpx.AsyncClient) -> None:
    held = [asyncio.create_task(ask(client, CHAT, long("a", 1900, n=5))) for _ in range(2)]
    await reaches(server, lambda s: s["a"]["in_flight"] == 2 and s["a"]["running"])
    answer = await client.post(CHAT, json=short("a"))
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    for one in held:
        one.cancel()
    await asyncio.wait(held)
    await server.idle("a", 5)
    assert (await ask(client, CHAT, short("a"))).done
    never = await client.post(CHAT, json=short("a", n=11))
    assert (never.status_code, never.json()["error"]["code"]) == (400, "too_many_completions")


# failures


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def configure(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "truncated"),
    "speechless": (without_tokenizer, "tokenizer"),
    "lying-width": (configure(intermediate_size=96), "shape"),
    "lying-depth": (configure(num_hidden_layers=3), "lack"),
    "lying-heads": (configure(num_attention_heads=0), "zero"),
}


async def test_broken_folders_and_requests_too_large_are_refused_with_what_is_wrong(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "broken"
    for name, (damage, _) in BROKEN.items():
        damage(build_tiny_model(folder / name))
    build_tiny_model(folder / "good")
    build_tiny_model(folder / "deep", context=8192)
    with pool(tmp_path, folder, 1e9, kv_cache="1") as server:
        async with server.client() as client:
            await _refuse_what_can_never_fit(client)
            good = asyncio.create_task(ask(client, CHAT, long("good", 400)))
            for name, (_, says) in BROKEN.items():
                answers = await asyncio.gather(
                    *(get_503(client, short(name), "model_load_failed") for _ in range(3))
                )
                messages = {answer.json()["error"]["message"] for answer in answers}
                assert len(messages) == 1, "all who waited hear the same"
                assert says in messages.pop().lower()
                state = (await server.models())[name]
                assert state["state"] == "failed"
                assert says in state["reason"].lower()
            assert (await good).done
            for name in ("truncated", "speechless"):
                build_tiny_model(folder / name)
                await ask(client, CHAT, short(name))
                assert (await server.models())[name]["state"] == "ready"
        assert len(server.engines()) == 4


async def _refuse_what_can_never_fit(client: httpx.AsyncClient) -> None:
    """Of a model that could take it, in caches that cannot."""
    refused = [
        ("context_length_exceeded", 8192, "8192 tokens > 8192 maximum"),
        ("insufficient_memory", 4000, "maximum of one request"),
    ]
    for code, tokens, says in refused:
        prompt = {"model": "deep", "prompt": [7] * tokens}
        answer = await client.post(TEXT, json=prompt)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, code)
        assert says in error["message"]
        assert str(tokens) in error["message"]
    most = {"model": "deep", "prompt": [7] * 1900, "max_tokens": 60, "ignore_eos": True}
    assert (await ask(client, TEXT, most)).reason == "length"


# everything at once


@dataclass
class Turmoil:
    """Clients who ask, stream and leave, and an operator who loads and unloads, at random."""

    server: Server
    random: random.Random
    until: float
    answers: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        async with self.server.client() as client, asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(self._repeat(client, self._ask))
            group.create_task(self._repeat(client, self._operate))

    async def _repeat(
        self,
        client: httpx.AsyncClient,
        act: Callable[[httpx.AsyncClient, str], Coroutine[Any, Any, None]],
    ) -> None:
        while time.monotonic() < self.until:
            async with asyncio.timeout(2 * LIVELY):
                await act(client, self.random.choice(NAMES))

    async def _ask(self, client: httpx.AsyncClient, name: str) -> None:
        tokens = self.random.choice([1, 5, 50, 400])
        keep_alive = self.random.choice([None, None, 0, 0.5])
        body = long(name, tokens, stream=False, keep_alive=keep_alive)
        if self.random.random() < 0.2:
            await self._leave(client, body)
        else:
            answer = await client.post(CHAT, json=body)
            self._note(answer, allowed={200, 503})
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == tokens

    async def _leave(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.random.uniform(0.001, 1)):
                await client.post(CHAT, json=body)
        except TimeoutError:
            self.answers["left"] = self.answers.get("left", 0) + 1

    async def _operate(self, client: httpx.AsyncClient, name: str) -> None:
        await asyncio.sleep(self.random.uniform(0, 0.5))
        act = self.random.choice(["load", "unload"])
        answer = await client.post(f"/admin/models/{name}/{act}")
        # A model that is loading cannot be unloaded.
        self._note(answer, allowed={200, 503} if act == "load" else {200, 400})

    def _note(self, answer: httpx.Response, allowed: set[int]) -> None:
        assert answer.status_code in allowed, answer.text
        key = str(answer.status_code)
        if answer.status_code == 503:
            key = answer.json()["error"]["code"]
            assert key == "model_loading", answer.text
            assert "retry-after" in answer.headers
        self.answers[key] = self.answers.get(key, 0) + 1


async def turmoil(server: Server, budget: int, seconds: float, seed: int) -> None:
    driver = Turmoil(server, random.Random(seed), time.monotonic() + seconds)
    async with audited(server) as ledger:
        await driver.run()
    await reaches(server, lambda s: not any(m["in_flight"] for m in s.values()))
    states = await server.models()
    print(driver.answers, f"{loads(states)} loads")
    assert ledger.active <= ledger.reserved <= budget
    assert not {"failed"} & ledger.states
    async with server.client() as client:
        for name in NAMES:
            await ask(client, CHAT, short(name, keep_alive=-1))
    states = await server.models()
    assert {e.pid for e in server.engines()} == {states[n]["pid"] for n in loaded(states)}


@pytest.mark.soak
@pytest.mark.parametrize("room", [1.5, 2.2])
@pytest.mark.timeout(400)
async def test_pool_changes_under_traffic_break_nothing_for_minutes(
    tmp_path: Path, models: Path, need: int, room: float
) -> None:
    with pool(tmp_path, models, room * need) as server:
        await turmoil(server, int(room * need), 180, seed=6)
