"""Many models behind one address, within one memory budget: nothing is lost in a swap."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mlx_server.models.pool.footprint import read_footprint
from tests.support.pool import (
    BATCH,
    LIVELY,
    NAMES,
    SWAP_INTERVAL,
    long,
    need_of,
    pool,
    short,
    three_models,
)
from tests.support.server import CHAT, TEXT, Answer, Server, ask, read_stream, until
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
            await asyncio.sleep(0.02)

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


# sharing and swapping


async def test_two_models_that_fit_together_are_loaded_once_each(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 2.2 * need) as server:
        async with server.client() as client:
            for i in range(100):
                await ask(client, CHAT, short(NAMES[i % 2]))
        states = await server.models()
        assert [states[name]["loads"] for name in NAMES] == [1, 1, 0]
        assert states["a"]["need"] == pytest.approx(need, rel=0.01)
        assert len(server.engines()) == 2


async def test_fifty_clients_of_an_absent_model_share_one_load(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need) as server:
        async with server.client() as client:
            answers = await asyncio.gather(*(ask(client, CHAT, short("a")) for _ in range(50)))
        assert len({answer.text for answer in answers}) == 1
        assert loads(await server.models()) == 1


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


async def test_random_traffic_on_a_budget_for_one_succeeds_within_the_budget(
    tmp_path: Path, models: Path, need: int
) -> None:
    budget = int(1.5 * need)
    with pool(tmp_path, models, budget) as server:
        started = time.monotonic()
        async with audited(server) as ledger:
            texts = await swap_at_random(server, 20, seed=1)
        took = time.monotonic() - started
        states = await server.models()
        swaps = loads(states) - 1
        assert swaps <= min(20, 1 + took / SWAP_INTERVAL)
        assert 0 < ledger.active <= ledger.reserved <= budget
        assert ledger.engines == 1
        assert [e.pid for e in server.engines()] == [states[n]["pid"] for n in loaded(states)]
    assert all(len(said) <= 1 for said in texts.values()), "an answer was cut or changed"
    print(f"{swaps} swaps in {took:.1f} s, {ledger.reserved:,} of {budget:,} bytes")


async def churn(server: Server, swaps: int) -> None:
    """Load one model after the other, `swaps` times."""
    async with server.client() as client:
        for i in range(swaps):
            await ask(client, CHAT, short(NAMES[i % 3]))


async def flat_over(server: Server, swaps: int) -> None:
    front = psutil.Process(server.process.pid)
    await churn(server, 6)
    memory, files = front.memory_info().rss, front.num_fds()
    before = loads(await server.models())
    await churn(server, swaps)
    growth = front.memory_info().rss / memory - 1
    print(f"front {growth:+.2%} over {swaps} swaps")
    assert loads(await server.models()) - before == swaps
    assert abs(growth) <= 0.03
    assert front.num_fds() <= files + 2
    assert len(server.engines()) == 1


async def test_swaps_leave_nothing_behind_in_the_front(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need) as server:
        await flat_over(server, 6)


@pytest.mark.soak
async def test_sixty_swaps_leave_nothing_behind_in_the_front(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need) as server:
        await flat_over(server, 60)


async def test_long_streams_of_two_models_are_grouped_and_nobody_starves(
    tmp_path: Path, models: Path, need: int
) -> None:
    waited: list[float] = []
    with pool(tmp_path, models, 1.5 * need) as server:

        async def worker(client: httpx.AsyncClient, number: int) -> None:
            for i in range(6):
                began = time.monotonic()
                answer = await ask(client, CHAT, long(NAMES[(i + number) % 2], 300))
                assert (answer.done, answer.reason) == (True, "length")
                waited.append(time.monotonic() - began)

        async with server.client() as client, asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(worker(client, number))
        swaps = loads(await server.models()) - 1
    assert len(waited) == 24
    assert swaps <= 12, "each swap serves at least two"
    print(f"{swaps} swaps for 24 streams, at most {max(waited):.1f} s each")


async def test_a_request_for_many_prompts_does_not_wait_for_itself(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need, swap_interval=0) as server:
        async with server.client() as client:
            bodies = [
                {"model": name, "prompt": ["word " * 200] * 8, "max_tokens": 2}
                for name in ("a", "b", "a", "b")
            ]
            async with asyncio.timeout(LIVELY):
                await asyncio.gather(*(ask(client, TEXT, body) for body in bodies))


# limits of waiting


async def starting(server: Server) -> psutil.Process:
    """The first engine, as soon as there is one."""
    found: list[psutil.Process] = []

    async def begun() -> bool:
        nonlocal found
        # Stopped between fork and exec, a child would hold up its parent.
        found = [e for e in server.engines() if "mlx_server.engine.worker" in e.cmdline()]
        return bool(found)

    await until(begun, LIVELY)
    return found[0]


@asynccontextmanager
async def stuck_load(server: Server, model: str) -> AsyncIterator[psutil.Process]:
    """Begin to load `model`, and hold its engine still while it does."""
    async with server.client() as client:
        first = asyncio.create_task(client.post(CHAT, json=short(model)))
        engine = await starting(server)
        engine.suspend()
        try:
            yield engine
        finally:
            if engine.is_running():
                engine.resume()
            await first


async def test_a_load_past_the_limit_answers_503_and_goes_on_for_the_next(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need, load_wait=1) as server:
        async with server.client() as client:
            began = time.monotonic()
            async with stuck_load(server, "a"):
                answers = [get_503(client, short("a"), "model_loading") for _ in range(50)]
                await asyncio.gather(*answers)
                assert time.monotonic() - began < 1 + 1 + 1, "the limit, +1 s, and the start"
            await reaches(server, lambda s: s["a"]["state"] == "ready")
            await ask(client, CHAT, short("a"))
        assert loads(await server.models()) == 1


async def test_only_so_many_wait_for_a_load(tmp_path: Path, models: Path, need: int) -> None:
    with pool(tmp_path, models, 1.5 * need, max_load_waiters=3, load_wait=20) as server:
        async with server.client() as client:
            async with stuck_load(server, "a"):
                waiting = [asyncio.create_task(ask(client, CHAT, short("a"))) for _ in range(2)]
                await reaches(server, lambda s: s["a"]["waiting_to_load"] == 3)
                await get_503(client, short("a"), "model_loading")
            await asyncio.gather(*waiting)


async def test_a_client_that_leaves_the_line_is_not_loaded_for(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need) as server:
        async with server.client() as client:
            held = asyncio.create_task(ask(client, CHAT, long("a", 1900)))
            await reaches(server, lambda s: s["a"]["running"])
            leaving = asyncio.create_task(client.post(CHAT, json=short("b")))
            await reaches(server, lambda s: s["b"]["waiting_to_load"] == 1)
            leaving.cancel()
            await reaches(server, lambda s: s["b"]["waiting_to_load"] == 0)
            await reaches(server, lambda s: s["a"]["state"] == "ready")
            assert (await held).done
            await ask(client, CHAT, short("a"))
        states = await server.models()
        assert (states["a"]["loads"], states["b"]["loads"]) == (1, 0)


async def test_a_model_loaded_for_a_client_that_left_expires_too(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need, keep_alive="1s") as server:
        async with server.client() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=short("a"), timeout=0.1)
        await reaches(server, lambda s: s["a"]["loads"] == 1 and s["a"]["state"] == "ready")
        await reaches(server, lambda s: s["a"]["state"] == "absent")


async def test_a_full_queue_answers_429_with_the_time_to_come_back(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need, "--model", "a", max_queue=2) as server:
        async with server.client() as client:
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
            assert (never.status_code, never.json()["error"]["code"]) == (
                400,
                "too_many_completions",
            )


# lifetimes


async def test_unused_models_expire_and_pinned_ones_and_those_of_the_start_stay(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(
        tmp_path, models, 3.5 * need, "--model", "a", pinned=["b"], keep_alive="0.5s"
    ) as server:
        async with server.client() as client:
            for name in NAMES:
                await ask(client, CHAT, short(name))
            await reaches(server, lambda s: s["c"]["state"] == "absent")
            assert loaded(await server.models()) == {"a", "b"}
            await ask(client, CHAT, short("c", keep_alive=-1))
            await ask(client, CHAT, short("a", keep_alive=0))
            await reaches(server, lambda s: s["a"]["state"] == "absent")
            assert loaded(await server.models()) == {"b", "c"}
            assert (await client.get("/ready")).status_code == 200
        assert len(server.engines()) == 2


async def test_what_pinned_models_leave_no_room_for_is_refused_at_once(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 2.5 * need, "--model", "a", pinned=["a", "b"]) as server:
        async with server.client() as client:
            await ask(client, CHAT, short("b"))
            answer = await get_503(client, short("c"), "insufficient_memory")
            assert f"{int(2.5 * need):,}" in answer.json()["error"]["message"]
            assert loaded(await server.models()) == {"a", "b"}


async def test_what_can_never_fit_is_refused_with_both_figures(
    tmp_path: Path, models: Path, need: int
) -> None:
    build_tiny_model(tmp_path / "large" / "large", hidden=512)
    with pool(tmp_path, tmp_path / "large", 1.5 * need) as server:
        async with server.client() as client:
            answer = await get_503(client, short("large"), "insufficient_memory")
            message = answer.json()["error"]["message"]
            footprint = read_footprint(tmp_path / "large" / "large", True)
            least = footprint.weights + footprint.working(BATCH) + footprint.kv(2048)
            assert f"{least:,}" in message
            assert f"{int(1.5 * need):,}" in message
        assert not server.engines()


async def test_a_request_that_can_never_fit_is_refused_with_figures(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "models" / "deep", context=8192)
    with pool(tmp_path, tmp_path / "models", 1e9, kv_cache="1") as server:
        async with server.client() as client:
            refused = [
                ("context_length_exceeded", 8190, "8192"),
                ("insufficient_memory", 4000, "can never fit"),
            ]
            for code, tokens, says in refused:
                answer = await client.post(CHAT, json=short("deep", max_tokens=tokens))
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (400, code)
                assert says in error["message"]
                assert str(tokens) in error["message"] or code == "context_length_exceeded"
            assert (await ask(client, CHAT, long("deep", 1900))).reason == "length"


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
    "unknown": (configure(model_type="no_such_type"), "no_such_type"),
    "lying-width": (configure(intermediate_size=96), "shape"),
    "lying-depth": (configure(num_hidden_layers=3), "parameters"),
    "lying-heads": (configure(num_attention_heads=0), "zero"),
}


async def test_broken_folders_say_what_is_wrong_and_work_once_mended(
    tmp_path: Path, models: Path
) -> None:
    folder = tmp_path / "broken"
    for name, (damage, _) in BROKEN.items():
        damage(build_tiny_model(folder / name))
    build_tiny_model(folder / "good")
    with pool(tmp_path, folder, 1e9) as server:
        async with server.client() as client:
            good = asyncio.create_task(ask(client, CHAT, long("good", 1500)))
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
        assert len(server.engines()) == 3


async def test_an_engine_killed_while_others_wait_is_replaced_for_them(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need, "--model", "a") as server:
        async with server.client() as client:
            held = asyncio.create_task(read_stream(client, CHAT, long("a", 1900)))
            await reaches(server, lambda s: s["a"]["running"])
            waiting = asyncio.create_task(ask(client, CHAT, short("b")))
            await reaches(server, lambda s: s["a"]["state"] == "draining")
            later = asyncio.create_task(ask(client, CHAT, short("a")))
            os.kill((await server.models())["a"]["pid"], signal.SIGKILL)
            kept = await held
            assert (kept.error, kept.reason) == (None, "length")
            assert (await waiting).done
            assert (await later).done
        await reaches(server, lambda s: s["a"]["state"] == "ready")
        assert len(server.engines()) == 1


async def test_an_engine_killed_while_it_loads_tells_those_who_wait(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 1.5 * need) as server:
        async with server.client() as client:
            async with stuck_load(server, "a") as engine:
                waiting = asyncio.create_task(get_503(client, short("a"), "model_load_failed"))
                await reaches(server, lambda s: s["a"]["waiting_to_load"] == 2)
                engine.kill()
                assert "signal 9" in (await waiting).text
            await ask(client, CHAT, short("a"))


@pytest.mark.parametrize("moment", ["loading", "draining"])
async def test_sigterm_in_the_middle_of_a_swap_leaves_no_process(
    tmp_path: Path, models: Path, need: int, moment: str
) -> None:
    with pool(tmp_path, models, 1.5 * need, grace_period=0.5) as server:
        async with server.client() as client:
            held: list[asyncio.Task[Answer]] = []
            if moment == "draining":
                held = [asyncio.create_task(read_stream(client, CHAT, long("a", 1900)))]
                await reaches(server, lambda s: s["a"]["running"])
            held.append(asyncio.create_task(ask(client, CHAT, short("b"))))
            await reaches(server, lambda s: moment in (s["a"]["state"], s["b"]["state"]))
            engines = server.engines()
            server.process.terminate()
            await asyncio.gather(*held, return_exceptions=True)
        server.process.wait(10)
        assert not [e for e in engines if e.is_running() and e.status() != psutil.STATUS_ZOMBIE]


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


async def test_pool_changes_under_traffic_break_nothing(
    tmp_path: Path, models: Path, need: int
) -> None:
    with pool(tmp_path, models, 2.2 * need) as server:
        await turmoil(server, int(2.2 * need), 8, seed=5)


@pytest.mark.soak
@pytest.mark.parametrize("room", [1.5, 2.2])
@pytest.mark.timeout(400)
async def test_pool_changes_under_traffic_break_nothing_for_minutes(
    tmp_path: Path, models: Path, need: int, room: float
) -> None:
    with pool(tmp_path, models, room * need) as server:
        await turmoil(server, int(room * need), 180, seed=6)
