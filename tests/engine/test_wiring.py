"""Weights wired on a Mac: once, alone, not for ever. MLX is watched; no Mac is needed."""

import gc
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from mlx_server.engine import memory
from mlx_server.engine.embedding.embedder import Embedder
from mlx_server.engine.idle import REST_SECONDS
from mlx_server.engine.loading import load
from mlx_server.engine.protocol import Device, Embed, Embedding, Load, LoadOptions, Ready
from mlx_server.engine.run.weights import array_sizes
from mlx_server.engine.schedule.scheduler import Scheduler
from mlx_server.engine.wiring import PAGE, SMALL_BUFFERS, Wiring
from tests.engine.conftest import request
from tests.support.bert import build_tiny_bert

GIB = 1 << 30
MAC = Device("metal", 16 * GIB, usable=10 * GIB, wirable=10 * GIB)


class Wired:
    """Records each limit that is set, and the bytes in use and in MLX's cache at that moment."""

    def __init__(self) -> None:
        self.limits: list[int] = []
        self.active: list[int] = []
        self.cached: list[int] = []

    def set(self, limit: int) -> int:
        self.limits.append(limit)
        self.active.append(mx.get_active_memory())
        self.cached.append(mx.get_cache_memory())
        return 0


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wired]:
    seen = Wired()
    monkeypatch.setattr(mx, "set_wired_limit", seen.set)
    monkeypatch.setattr(memory, "read_device", lambda: MAC)
    limits = mx.set_memory_limit(GIB), mx.set_cache_limit(GIB)
    yield seen
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])


def loaded(
    path: Path, wired_limit: int, embedding: Embedding | None = None
) -> tuple[Scheduler | Embedder, Ready]:
    options = LoadOptions(
        memory_limit="4GB", wired_limit=wired_limit, openblas="off", trust_remote_code=True
    )
    return load(Load(str(path), options, embedding=embedding))


def compute(work: Scheduler | Embedder) -> None:
    while work.busy:
        for _ in work.turn():
            continue
        work.release()


def let_rest(work: Scheduler | Embedder) -> None:
    [chore] = [chore for chore in work.chores() if chore.delay == REST_SECONDS]
    chore.run()


def test_weights_are_wired_once_when_nothing_else_is_there(tiny_model: Path, wired: Wired) -> None:
    gc.collect()  # what earlier tests left must not go meanwhile
    before = mx.get_active_memory()
    work, ready = loaded(tiny_model, GIB)
    assert isinstance(work, Scheduler)
    work.add(request(range(1, 200), 5))
    compute(work)
    [limit], [active], [cached] = wired.limits, wired.active, wired.cached
    assert abs(active - before - ready.weights_bytes) < SMALL_BUFFERS
    assert cached == 0
    arrays = len(array_sizes(work.model.model))
    assert active + SMALL_BUFFERS <= limit < active + SMALL_BUFFERS + arrays * PAGE
    assert (ready.device, ready.memory.wired, work.stats().memory.wired) == ("metal", limit, limit)
    work.close()


def test_an_engine_that_is_idle_for_minutes_unwires_and_wires_nothing_but_weights_again(
    tiny_model: Path, wired: Wired
) -> None:
    work, _ = loaded(tiny_model, GIB)
    assert isinstance(work, Scheduler)
    work.add(request(range(1, 200), 5))
    compute(work)
    assert work.runner.prefix.nbytes > 0
    let_rest(work)
    let_rest(work)
    assert wired.limits[1:] == [0]
    assert work.stats().memory.wired == work.runner.prefix.nbytes == 0
    for _ in range(2):
        work.add(request(range(1, 200), 5))
        compute(work)
    first, _, again = wired.limits
    assert wired.active[2] < wired.active[0] + SMALL_BUFFERS
    assert again < first + SMALL_BUFFERS
    assert wired.cached[2] == 0
    work.close()


@pytest.mark.parametrize("resting", [False, True])
def test_an_engine_unwires_before_it_ends(tiny_model: Path, wired: Wired, resting: bool) -> None:
    work, _ = loaded(tiny_model, GIB)
    if resting:
        let_rest(work)
    work.close()
    assert len(wired.limits) == 2
    assert wired.limits[1] == 0


def test_weights_that_do_not_fit_their_limit_are_not_wired_at_all(
    tiny_model: Path, wired: Wired
) -> None:
    work, ready = loaded(tiny_model, 1000)
    assert isinstance(work, Scheduler)
    work.add(request(range(1, 200), 5))
    compute(work)
    let_rest(work)
    assert work.runner.prefix.nbytes > 0
    work.close()
    assert (wired.limits, ready.memory.wired) == ([], 0)


def test_an_embedding_models_weights_are_wired_too(tmp_path: Path, wired: Wired) -> None:
    work, ready = loaded(build_tiny_bert(tmp_path / "bert"), GIB, Embedding(["mean"], True))
    let_rest(work)
    work.add(Embed(1, [[1, 2, 3]]))
    compute(work)
    work.close()
    assert [limit > 0 for limit in wired.limits] == [True, False, True, False]
    assert ready.memory.wired == wired.limits[0] >= ready.weights_bytes


def test_every_weight_counts_with_its_whole_pages(wired: Wired) -> None:
    wiring = Wiring(GIB)
    mx.clear_cache()
    wiring.hold([1, PAGE, PAGE + 1, 3 * PAGE - 5])
    beside = (PAGE - 1) + 0 + (PAGE - 1) + 5
    assert wired.limits == [mx.get_active_memory() + SMALL_BUFFERS + beside]


def test_nothing_can_be_wired_but_on_metal(wired: Wired) -> None:
    assert memory.DeviceMemory("1GB", None, GIB, Device("cpu", GIB, GIB)).wiring.limit == 0


def test_an_engine_on_a_gpu_keeps_its_priority(tiny_model: Path, wired: Wired) -> None:
    niceness = psutil.Process().nice()
    work, _ = loaded(tiny_model, 0)
    work.close()
    assert psutil.Process().nice() == niceness
