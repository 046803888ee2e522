"""Many models within one memory budget: loads, lines, swaps, lifetimes; engines are scripted."""

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_server.engine.protocol import Device
from mlx_server.errors import (
    BadRequest,
    InsufficientMemory,
    ModelLoadFailed,
    ModelLoading,
    ModelNotFound,
    ServerError,
    Unavailable,
)
from mlx_server.models.pool import supervisor
from mlx_server.models.pool.footprint import read_footprint
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.locks import RemovalLock
from tests.support.engines import CRASH
from tests.support.pool import BATCH, NAMES, Pool, local_pool, need_of, three_models
from tests.support.tiny import build_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_models(tmp_path_factory.mktemp("pool") / "models")


@pytest.fixture(scope="module")
def need(models: Path) -> int:
    return need_of(models / "a")


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MIN_DELAY", 0.001)


@asynccontextmanager
async def asking(pool: Pool, *names: str) -> AsyncIterator[list[asyncio.Task[list[int]]]]:
    """Requests for these models, under way."""
    tasks = [asyncio.create_task(pool.ask(name)) for name in names]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# wired memory


async def test_what_all_models_wire_stays_within_the_limit_for_that(
    tmp_path: Path, models: Path, need: int
) -> None:
    mac = Device("metal", 1 << 40, usable=1 << 40, wirable=1 << 40)
    weights = read_footprint(models / "a", True).weights
    wired_memory = str(int(1.5 * weights))
    async with local_pool(
        tmp_path, models, 3.2 * need, device=mac, wired_memory=wired_memory, dequantize="always"
    ) as pool:
        for name in ("a", "b"):
            await pool.ask(name)
        granted = [engine.load.options.wired_limit for engine in pool.fleet.engines]
        assert granted == [int(1.5 * weights), int(0.5 * weights)]
        await pool.manager.unload("a")
        await pool.ask("c")
        assert pool.fleet.engines[-1].load.options.wired_limit == int(1.5 * weights)
        assert [pool.status(name).memory.wired for name in ("b", "c")] == [0, weights]


async def test_nothing_is_wired_where_the_device_cannot(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.2 * need) as pool:
        await pool.ask("a")
        assert pool.fleet.engines[0].load.options.wired_limit == 0


# sharing and swapping


async def test_two_models_that_fit_together_are_loaded_once_each(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.2 * need) as pool:
        for i in range(100):
            assert await pool.ask(NAMES[i % 2]) == [3, 4, 5]
        assert (pool.loads, pool.loaded) == (2, {"a", "b"})
        assert pool.reserved == 2 * need


async def test_fifty_requests_for_an_absent_model_share_one_load(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        await asyncio.gather(*(pool.ask("a") for _ in range(50)))
        assert pool.loads == 1


async def test_a_request_for_a_loaded_model_waits_for_no_disk(
    tmp_path: Path, models: Path, need: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> ModelEntry:
        raise AssertionError("the disk was asked")

    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        await pool.ask("a")
        monkeypatch.setattr(pool.manager.catalog, "find", find)
        assert await pool.ask("a") == [3, 4, 5]


async def test_a_model_makes_room_for_another_once_it_is_idle(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        async with pool.held("a"), asking(pool, "b") as [waiting]:
            await pool.reaches(lambda: pool.status("a").state == "draining")
            assert pool.loaded == {"a"}
            assert pool.engine("a").running
        assert await asyncio.create_task(pool.ask("b")) == [3, 4, 5]
        assert waiting.done()
        assert pool.loaded == {"b"}
        assert len(pool.fleet.running) == 1


async def test_what_is_asked_of_a_model_that_makes_room_waits_for_its_return(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(pool.held("a"))
            async with asking(pool, "b") as [swap]:
                await pool.reaches(lambda: pool.status("a").state == "draining")
                async with asking(pool, "a") as [later]:
                    await pool.reaches(lambda: pool.status("a").waiting_to_load == 1)
                    await stack.aclose()
                    assert await swap == await later
        assert (pool.status("a").loads, pool.status("b").loads) == (2, 1)


async def test_models_are_made_room_for_in_the_order_in_which_they_were_asked_for(
    tmp_path: Path, models: Path, need: int
) -> None:
    order: list[str] = []

    async def ask(pool: Pool, name: str) -> None:
        await pool.ask(name)
        order.append(name)

    async with local_pool(tmp_path, models, 1.5 * need) as pool, asyncio.TaskGroup() as group:
        async with pool.held("a"):
            for name in ("b", "c"):
                group.create_task(ask(pool, name))
                # In the line, that is: what it needs is known.
                await pool.reaches(lambda name=name: pool.status(name).need)
        await pool.reaches(lambda: len(order) == 2)
        assert order == ["b", "c"]


async def test_alternating_traffic_is_grouped_and_nobody_starves(
    tmp_path: Path, models: Path, need: int
) -> None:
    async def worker(pool: Pool, number: int) -> None:
        for i in range(6):
            async with pool.held(NAMES[(i + number) % 2]):
                await asyncio.sleep(0.003)

    async with local_pool(tmp_path, models, 1.5 * need, swap_interval=0.005) as pool:
        async with asyncio.timeout(10):
            await asyncio.gather(*(worker(pool, number) for number in range(4)))
        assert pool.loads <= 13, "each load serves at least two"


async def test_the_budget_holds_at_any_time_of_random_traffic(
    tmp_path: Path, models: Path, need: int
) -> None:
    async def worker(pool: Pool, number: int) -> None:
        for i in range(30):
            tokens = 1 + (7 * i + number) % 40
            assert len(await pool.ask(NAMES[(i * i + number) % 3], tokens)) == tokens
            assert pool.reserved <= pool.budget
            assert len(pool.fleet.running) <= 1

    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        await asyncio.gather(*(worker(pool, number) for number in range(3)))


async def test_swaps_leave_nothing_behind(tmp_path: Path, models: Path, need: int) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        async with asyncio.timeout(30):
            for name in NAMES * 2:
                await pool.ask(name)
            await pool.reaches(lambda: len(pool.fleet.running) == 1)
            tasks, files = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
            for name in NAMES * 10:
                await pool.ask(name)
        assert pool.loads == 36
        await pool.reaches(lambda: len(pool.fleet.running) == 1)
        assert pool.texts.open_texts == 1
        await pool.reaches(lambda: len(asyncio.all_tasks()) <= tasks)
        assert len(os.listdir("/proc/self/fd")) <= files + 2


# limits of waiting


async def test_a_load_past_the_limit_is_refused_and_goes_on_for_the_next(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, load_wait=0.05) as pool:
        pool.fleet.may_load.clear()
        began = time.monotonic()
        for refused in await asyncio.gather(
            *(pool.ask("a") for _ in range(50)), return_exceptions=True
        ):
            assert isinstance(refused, ModelLoading)
            assert refused.retry_after is not None
            assert refused.retry_after >= 1
            assert "loading" in refused.message
        assert time.monotonic() - began < 2
        assert pool.status("a").state == "loading"
        pool.fleet.may_load.set()
        await pool.reaches(lambda: pool.status("a").state == "ready")
        assert await pool.ask("a") == [3, 4, 5]
        assert pool.loads == 1


async def test_an_operator_may_wait_for_longer(tmp_path: Path, models: Path, need: int) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, load_wait=0.01) as pool:
        pool.fleet.may_load.clear()
        loading = asyncio.create_task(pool.manager.load("a"))
        with pytest.raises(ModelLoading):
            await pool.ask("a")
        pool.fleet.may_load.set()
        assert (await loading).state == "ready"


async def test_only_so_many_wait_for_a_load(tmp_path: Path, models: Path, need: int) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, max_load_waiters=3) as pool:
        pool.fleet.may_load.clear()
        async with asking(pool, "a", "a", "a") as waiting:
            await pool.reaches(lambda: pool.status("a").waiting_to_load == 3)
            with pytest.raises(ModelLoading, match="3 requests wait"):
                await pool.ask("a")
            pool.fleet.may_load.set()
            await asyncio.gather(*waiting)


async def test_a_load_that_takes_too_long_fails_and_its_engine_ends(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, load_timeout=0.05) as pool:
        pool.fleet.may_load.clear()
        with pytest.raises(ModelLoadFailed, match=r"within 0\.05 seconds"):
            await pool.ask("a")
        assert pool.status("a").state == "failed"
        assert not pool.fleet.running


async def test_a_request_that_leaves_the_line_is_not_loaded_for(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        async with pool.held("a"):
            async with asking(pool, "b"):
                await pool.reaches(lambda: pool.status("a").state == "draining")
            await pool.reaches(lambda: pool.status("a").state == "ready")
        await pool.ask("a")
        assert (pool.status("a").loads, pool.status("b").loads) == (1, 0)


async def test_a_model_loaded_for_a_request_that_left_expires_too(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, keep_alive="0.1s") as pool:
        pool.fleet.may_load.clear()
        async with asking(pool, "a"):
            await pool.reaches(lambda: pool.status("a").state == "loading")
        pool.fleet.may_load.set()
        await pool.reaches(lambda: pool.status("a").state == "ready")
        await pool.reaches(lambda: pool.status("a").state == "absent")
        assert pool.loads == 1


# lifetimes


async def test_unused_models_expire_and_pinned_ones_and_those_of_the_start_stay(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(
        tmp_path, models, 3.5 * need, "a", pinned=["b"], keep_alive="0.05s"
    ) as pool:
        for name in NAMES:
            await pool.ask(name)
        assert pool.status("a").expires is pool.status("b").expires is None
        await pool.reaches(lambda: pool.status("c").state == "absent")
        assert pool.loaded == {"a", "b"}
        await pool.ask("c", keep_alive=-1)
        await pool.ask("a", keep_alive=0)
        await pool.ask("b", keep_alive=0)
        await pool.reaches(lambda: pool.status("a").state == "absent")
        await asyncio.sleep(0)
        assert pool.loaded == {"b", "c"}
        assert pool.manager.not_ready_reason is None
        assert len(pool.fleet.running) == 2


async def test_a_model_that_is_pinned_later_stays_until_it_is_unpinned(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 3.5 * need, keep_alive="0.05s") as pool:
        assert (await pool.manager.pin("a", True)).pinned
        await pool.ask("a")
        await pool.ask("b")
        await pool.manager.pin("b", True)
        assert pool.status("a").expires is pool.status("b").expires is None
        await pool.ask("c")
        await pool.reaches(lambda: pool.status("c").state == "absent")
        assert pool.loaded == {"a", "b"}
        assert not (await pool.manager.pin("a", False)).pinned
        await pool.reaches(lambda: pool.status("a").state == "absent")
        assert pool.loaded == {"b"}


async def test_single_models_may_stay_for_longer(tmp_path: Path, models: Path, need: int) -> None:
    async with local_pool(
        tmp_path, models, 3.5 * need, keep_alive="0", keep_alive_by_model={"b": "1h"}
    ) as pool:
        await pool.ask("b")
        await pool.ask("a")
        await pool.reaches(lambda: pool.loaded == {"b"})
        expires = pool.status("b").expires
        assert expires is not None
        assert expires - time.time() == pytest.approx(3600, abs=10)


async def test_what_pinned_models_leave_no_room_for_is_refused_at_once(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.5 * need, pinned=["a", "b"]) as pool:
        await pool.ask("a")
        await pool.ask("b")
        with pytest.raises(InsufficientMemory, match=f"{2 * need:,}"):
            await pool.ask("c")
        assert pool.loaded == {"a", "b"}


async def test_what_can_never_fit_is_refused_with_both_figures(tmp_path: Path, need: int) -> None:
    models = three_models(tmp_path / "models")
    footprint = read_footprint(build_tiny_model(models / "large", hidden=512), True)
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        least = footprint.weights + footprint.working(BATCH) + footprint.kv(2048)
        with pytest.raises(InsufficientMemory, match=f"{least:,}.*{pool.budget:,}"):
            await pool.ask("large")
        assert not pool.fleet.engines


async def test_what_a_model_took_counts_from_its_second_load_on(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        footprint = read_footprint(models / "a", True)
        pool.fleet.weights_bytes = footprint.weights // 2
        await pool.ask("a")
        measured = need - footprint.weights + footprint.weights // 2
        assert pool.status("a").need == measured
        await pool.manager.unload("a")
        await pool.ask("a")
        load = pool.engine("a").load
        assert load is not None
        assert load.options.memory_limit == str(measured)


# readiness


async def test_the_server_is_ready_when_what_was_named_at_the_start_is_loaded(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.5 * need, "a", "b") as pool:
        assert pool.manager.not_ready_reason is not None
        assert "Model `b` is loading." in (pool.manager.not_ready_reason or "")
        await pool.reaches(lambda: pool.manager.not_ready_reason is None)
        await pool.manager.unload("a")
        assert pool.manager.not_ready_reason is None, "an operator's doing is no failure"


async def test_a_model_of_the_start_that_cannot_be_loaded_says_why(
    tmp_path: Path, need: int
) -> None:
    models = three_models(tmp_path / "models")
    os.truncate(models / "b" / "model.safetensors", 5000)
    async with local_pool(tmp_path, models, 2.5 * need, "a", "b") as pool:
        await pool.reaches(lambda: pool.status("a").state == "ready")
        assert pool.manager.not_ready_reason is not None
        assert "`b` is failed" in (pool.manager.not_ready_reason or "")
        assert "truncated" in (pool.manager.not_ready_reason or "")


# operators


async def test_an_unload_waits_for_requests_and_takes_no_new_ones(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        async with pool.held("a"):
            unloading = asyncio.create_task(pool.manager.unload("a"))
            await pool.reaches(lambda: pool.status("a").state == "draining")
            later = asyncio.create_task(pool.ask("a"))
            await pool.reaches(lambda: pool.status("a").waiting_to_load)
            assert not unloading.done()
        assert (await unloading).pid is None
        assert await later == [3, 4, 5]
        assert pool.loads == 2


async def test_an_unload_that_is_given_up_leaves_the_model_as_it_was(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        async with pool.held("a"):
            unloading = asyncio.create_task(pool.manager.unload("a"))
            await pool.reaches(lambda: pool.status("a").state == "draining")
            unloading.cancel()
            await asyncio.wait([unloading])
            assert pool.status("a").state == "ready"
        await pool.ask("a")
        assert pool.loads == 1


async def test_a_model_that_is_loading_cannot_be_unloaded(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        assert (await pool.manager.unload("b")).state == "absent"
        pool.fleet.may_load.clear()
        async with asking(pool, "a"):
            await pool.reaches(lambda: pool.status("a").state == "loading")
            with pytest.raises(BadRequest, match="still loading"):
                await pool.manager.unload("a")


async def test_models_are_known_by_name_and_do_what_they_are_made_for(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        with pytest.raises(ModelNotFound):
            await pool.ask("no-such-model")
        with pytest.raises(BadRequest, match="not made for embeddings"):
            async with pool.manager.acquire("a", purpose="embed"):
                pass
        assert pool.loads == 0


# failures


async def test_all_who_wait_for_a_load_that_fails_hear_why_and_the_next_one_tries_again(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.outcomes["a"] = deque(["no such type"])
        pool.fleet.may_load.clear()
        async with asking(pool, "a", "a", "a") as tasks:
            await pool.reaches(lambda: pool.status("a").waiting_to_load == 3)
            pool.fleet.may_load.set()
            refused = await asyncio.gather(*tasks, return_exceptions=True)
        for error in refused:
            assert isinstance(error, ModelLoadFailed)
            assert error.message == "The model `a` could not be loaded: no such type"
        status = pool.status("a")
        assert (status.state, status.reason, status.loads) == ("failed", "no such type", 1)
        assert pool.reserved == 0
        assert await pool.ask("a") == [3, 4, 5]
        assert pool.status("a").reason is None


async def test_a_failed_load_gives_its_memory_to_the_next_in_line(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.may_load.clear()
        pool.fleet.outcomes["a"] = deque(["no such type"])
        async with asking(pool, "a") as [failing]:
            await pool.reaches(lambda: pool.status("a").state == "loading")
            async with asking(pool, "b") as [waiting]:
                await pool.reaches(lambda: pool.status("b").waiting_to_load)
                pool.fleet.may_load.set()
                assert await waiting == [3, 4, 5]
            with pytest.raises(ModelLoadFailed):
                await failing


async def test_damaged_files_are_told_without_an_engine_and_work_once_mended(
    tmp_path: Path, need: int
) -> None:
    models = three_models(tmp_path / "models")
    os.truncate(models / "b" / "model.safetensors", 5000)
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        with pytest.raises(ModelLoadFailed, match="truncated"):
            await pool.ask("b")
        assert not pool.fleet.engines
        build_tiny_model(models / "b", seed=1)
        await pool.ask("b")


async def test_an_engine_that_crashes_while_it_loads_shows_its_last_words(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.outcomes["a"] = deque([CRASH])
        with pytest.raises(ModelLoadFailed, match="signal 6"):
            await pool.ask("a")
        status = pool.status("a")
        assert (status.state, status.pid) == ("failed", None)
        assert status.last_lines == ("no way to load this",)
        await pool.ask("a")


async def test_an_engine_that_ends_under_a_request_is_replaced(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.works = False
        async with asking(pool, "a") as [asked]:
            await pool.reaches(lambda: pool.status("a").pid and pool.engine("a").open)
            pool.fleet.works = True
            first = pool.engine("a")
            first.crash(says="x" * 1000)
            assert await asked == [3, 4, 5]
        status = pool.status("a")
        assert (status.loads, status.restarts, status.state) == (1, 1, "ready")
        assert status.last_lines == ("x" * 500,)
        await pool.manager.unload("a")
        assert pool.status("a").restarts == 1, "counters never fall"


async def test_an_engine_killed_while_others_wait_for_room_is_replaced_first(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.works = False
        async with asking(pool, "a") as [kept]:
            await pool.reaches(lambda: pool.status("a").pid and pool.engine("a").open)
            async with asking(pool, "b", "a") as waiting:
                await pool.reaches(lambda: pool.status("a").state == "draining")
                pool.fleet.works = True
                pool.engine("a").crash(-signal.SIGKILL)
                assert await asyncio.gather(kept, *waiting) == [[3, 4, 5]] * 3
        await pool.reaches(lambda: len(pool.fleet.running) == 1)


async def test_a_model_unloaded_while_its_engine_restarts_finishes_its_requests(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.works = False
        async with asking(pool, "a") as [asked]:
            await pool.reaches(lambda: pool.status("a").pid and pool.engine("a").open)
            pool.fleet.may_load.clear()
            pool.engine("a").crash()
            await pool.reaches(lambda: pool.status("a").state == "restarting")
            unloading = asyncio.create_task(pool.manager.unload("a"))
            await pool.reaches(lambda: pool.status("a").state == "draining")
            pool.fleet.works = True
            pool.fleet.may_load.set()
            assert (await unloading).state == "absent"
            assert await asked == [3, 4, 5]


async def test_a_model_whose_engine_cannot_be_loaded_again_fails_its_requests(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.works = False
        async with asking(pool, "a") as [asked]:
            await pool.reaches(lambda: pool.status("a").pid and pool.engine("a").open)
            pool.fleet.outcomes["a"] = deque([CRASH] * 3)
            pool.engine("a").crash()
            with pytest.raises(ModelLoadFailed, match="signal 6"):
                await asked
        status = pool.status("a")
        assert (status.state, status.last_lines) == ("failed", ("no way to load this",))
        pool.fleet.works = True
        await pool.ask("a")


async def test_an_engine_that_nobody_used_is_replaced_when_it_is_asked_for(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        for loads in (1, 2):
            await pool.ask("a")
            pool.engine("a").crash()
            await pool.reaches(lambda: pool.status("a").state == "absent")
            assert (pool.loads, pool.fleet.running, pool.status("a").restarts) == (loads, [], 0)


async def test_whoever_asks_while_an_unused_engine_is_being_given_up_gets_a_new_one(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        for turns in range(60):
            await pool.ask("a")
            pool.engine("a").crash()
            for _ in range(turns):  # of the event loop
                await asyncio.sleep(0)
            assert await asyncio.wait_for(pool.ask("a"), 5) == [3, 4, 5]


async def test_an_engine_of_the_start_is_replaced_by_itself(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, "a") as pool:
        await pool.reaches(lambda: pool.manager.not_ready_reason is None)
        pool.fleet.may_load.clear()
        pool.engine("a").crash()
        await pool.reaches(lambda: pool.manager.not_ready_reason is not None)
        pool.fleet.may_load.set()
        await pool.reaches(lambda: pool.manager.not_ready_reason is None)
        assert pool.status("a").loads == 2


# stopping


@pytest.mark.parametrize("moment", ["loading", "draining", "restarting"])
async def test_a_pool_that_stops_fails_its_requests_and_ends_its_engines(
    tmp_path: Path, models: Path, need: int, moment: str
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        pool.fleet.works = False
        names = {"loading": ["a"], "draining": ["a", "b"], "restarting": ["a"]}[moment]
        if moment == "loading":
            pool.fleet.may_load.clear()
        async with asking(pool, *names) as asked:
            if moment == "restarting":
                await pool.reaches(lambda: pool.status("a").pid and pool.engine("a").open)
                pool.fleet.may_load.clear()
                pool.engine("a").crash()
            await pool.reaches(lambda: moment in {pool.status(name).state for name in names})
            await pool.manager.stop()
            for ended in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(ended, Unavailable)
        assert not pool.fleet.running
        assert pool.manager.not_ready_reason == "The server is stopping."
        with pytest.raises(ServerError, match="stopping"):
            await pool.ask("a")


# requests that name no model


async def test_a_request_without_a_model_gets_the_one_that_is_loaded(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need) as pool:
        with pytest.raises(BadRequest, match="none is loaded"):
            await pool.ask("")
        for name in NAMES:
            await pool.ask(name)
            assert await pool.ask("") == [3, 4, 5]
            assert pool.loaded == {name}


async def test_a_request_without_a_model_waits_for_the_one_named_at_the_start(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 1.5 * need, "b") as pool:
        assert await pool.ask("") == [3, 4, 5]
        assert (pool.loaded, pool.loads) == ({"b"}, 1)


async def test_a_request_without_a_model_is_refused_where_it_could_mean_several(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.5 * need) as pool:
        await pool.ask("a")
        await pool.ask("b")
        with pytest.raises(BadRequest, match="of a, b"):
            await pool.ask("")
        with pytest.raises(BadRequest, match="none is loaded"):
            async with pool.manager.acquire("", purpose="embed"):
                pass


# starting


async def test_a_start_has_failed_once_all_models_named_have(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.5 * need) as pool:
        pool.fleet.outcomes |= {"a": deque([CRASH]), "b": deque([CRASH])}
        await pool.manager.start(["a", "b"])
        reason = await pool.manager.start_failure()
        assert reason is not None
        assert "`a` is failed: " in reason
        assert "`b` is failed: " in reason


async def test_a_start_has_not_failed_while_a_model_is_loaded_or_none_was_named(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 2.5 * need) as pool:
        assert await pool.manager.start_failure() is None
        pool.fleet.outcomes["a"] = deque([CRASH])
        await pool.manager.start(["a", "b"])
        assert await pool.manager.start_failure() is None
        assert pool.loaded == {"b"}


async def test_a_start_fails_for_models_that_can_never_fit(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, 0.5 * need, "a") as pool:
        assert "memory" in str(await pool.manager.start_failure())


# what a model brings


async def test_each_engine_gets_the_tokenizer_that_the_folder_lacks(
    tmp_path: Path, models: Path, need: int
) -> None:
    async with local_pool(tmp_path, models, need) as pool:
        pool.texts.tokenizer = b"{}"
        async with pool.held("a"):
            await pool.ask("a")
            first = pool.engine("a")
            assert first.tokenizer == b"{}"
            first.crash()
            await pool.reaches(lambda: pool.status("a").restarts == 1)
            await pool.ask("a")
            assert pool.engine("a") is not first
            assert pool.engine("a").tokenizer == b"{}"


@pytest.mark.parametrize(("on", "expected"), [(True, {"temperature": 0.6}), (False, {})])
async def test_a_models_own_sampling_can_be_turned_off(
    tmp_path: Path, need: int, on: bool, expected: dict[str, float]
) -> None:
    models = tmp_path / "models"
    build_tiny_model(models / "a")
    (models / "a" / "generation_config.json").write_text('{"temperature": 0.6}')
    async with (
        local_pool(tmp_path, models, 2 * need, model_sampling=on) as pool,
        pool.manager.acquire("a") as model,
    ):
        assert model.sampling == expected


# draft models


async def test_a_draft_model_is_not_removed_while_it_guesses(tmp_path: Path, models: Path) -> None:
    async with local_pool(tmp_path, models, 1 << 30, draft_model_by_model={"a": "b"}) as pool:
        await pool.ask("a")
        assert pool.status("a").draft_model == "b"
        assert pool.loaded == {"a"}, "it serves no requests by that"
        with pytest.raises(BadRequest, match="loaded by a running server"):
            RemovalLock(tmp_path / "home", models / "b")
        await pool.manager.unload("a")
        with RemovalLock(tmp_path / "home", models / "b"):
            pass


async def test_a_draft_model_that_is_not_there_fails_the_load_with_a_reason(
    tmp_path: Path, models: Path
) -> None:
    more: dict[str, Any] = {"draft_model": "nobody", "draft_model_by_model": {"b": ""}}
    async with local_pool(tmp_path, models, 1 << 30, **more) as pool:
        with pytest.raises(ModelLoadFailed, match="its draft model: There is no model 'nobody'"):
            await pool.ask("a")
        assert pool.status("a").state == "failed"
        assert await pool.ask("b") == [3, 4, 5]


async def test_without_speculation_no_draft_model_is_loaded(tmp_path: Path, models: Path) -> None:
    more = {"draft_model": "b", "speculation": "off"}
    async with local_pool(tmp_path, models, 1 << 30, **more) as pool:
        await pool.ask("a")
        assert pool.status("a").draft_model is None
        with pytest.raises(BadRequest, match="`speculation` is off"):
            await pool.manager.load("a", "c")
