"""How an engine keeps its KV caches within their limit, and that nobody can tell from the text."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.plan import Start
from mlx_server.engine.protocol import Begun, Generate, LoadOptions, Row, Sampling, Stats
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.kv import KvCost, cache_bytes, extend, keep_rows, merge
from mlx_server.engine.schedule.scheduler import Scheduler
from mlx_server.engine.sequence import Sequence
from mlx_server.errors import EngineFailed, ModelLoadFailed
from tests.engine.conftest import idle, request, rows_of, started, tokens_of
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_model

CONTEXT = 2048
PLACES = 8
EXPECTED = 200
"""Tokens for which the limit holds that many places; the longest requests take more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT)


@pytest.fixture(scope="module")
def cost(model: Path) -> KvCost:
    loaded, _ = load_model(model)
    cache = list(make_prompt_cache(loaded))
    loaded(mx.array([[0]]), cache=cache)
    return KvCost(cache)


@dataclass
class Watch:
    """The reports of an engine while the block runs; the last is of when all has ended."""

    reports: list[Stats] = field(default_factory=list)

    @property
    def most_kv(self) -> int:
        return max(report.kv_bytes for report in self.reports)


@asynccontextmanager
async def watched(engine: DirectEngine) -> AsyncIterator[Watch]:
    watch = Watch()

    async def look() -> None:
        while True:
            if engine.stats is not None and engine.stats not in watch.reports[-1:]:
                watch.reports.append(engine.stats)
            await asyncio.sleep(0.005)

    watcher = asyncio.create_task(look())
    try:
        yield watch
        # A last report comes when all has ended; one before it is up to a second old.
        await idle(engine)
        if engine.stats is not None:
            watch.reports.append(engine.stats)
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])


def crowd(count: int, long: int) -> list[Generate]:
    """Requests of different lengths and settings, all seeded; the first `long` take 350 tokens."""
    settings = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 40, "repetition_penalty": 1.3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.0},
        {"temperature": 1.0, "logit_bias": {9: 3.0}},
    ]
    return [
        request(
            [(7 * i * j + 3) % 400 for j in range(1, 20 + (37 * i) % 120)],
            350 if i < long else 5 + (31 * i) % 30,
            Sampling(seed=i, **settings[i % len(settings)]),
            logprobs=2 if i % 3 == 0 else None,
            prompt_logprobs=1 if i % 11 == 0 else None,
        )
        for i in range(count)
    ]


def told(rows: list[Row]) -> tuple[list[int], list[int], int | None]:
    """The tokens, the log-probabilities' tokens, and the length of the scored prompt."""
    scored = [row.prompt_logprobs for row in rows if row.prompt_logprobs is not None]
    assert len(scored) <= 1
    return (
        [token for row in rows for token in row.tokens],
        [entry.token for row in rows for entry in row.logprobs or []],
        len(scored[0]) if scored else None,
    )


@pytest.fixture(scope="module")
async def roomy(model: Path) -> AsyncIterator[DirectEngine]:
    """An engine that has a place for everybody."""
    async with started(model, max_batch=64) as engine:
        yield engine


async def answers(engine: DirectEngine, requests: list[Generate]) -> list[object]:
    return [told(rows) for rows in await rows_of(engine, *requests)]


@pytest.mark.parametrize("count", [14, pytest.param(24, marks=pytest.mark.soak)])
async def test_a_crowd_that_fits_eight_at_a_time_finishes_within_the_limit_and_unchanged(
    model: Path, roomy: DirectEngine, cost: KvCost, count: int
) -> None:
    limit = cost.bytes(PLACES, EXPECTED)
    requests = crowd(count, 8)
    expected = await answers(roomy, requests)
    async with started(model, max_batch=64, kv_limit=limit) as engine, watched(engine) as watch:
        got = await answers(engine, requests)
    assert got == expected
    assert 0 < watch.most_kv <= limit
    assert watch.reports[-1].preempted > 0
    assert all(r.memory.active <= r.memory.limit for r in watch.reports)
    print(f"{watch.reports[-1].preempted} preemptions, {watch.most_kv / limit:.0%} of the limit")


@pytest.mark.parametrize("count", [12, pytest.param(20, marks=pytest.mark.soak)])
async def test_the_limit_holds_while_requests_come_and_leave_at_random(
    model: Path, roomy: DirectEngine, cost: KvCost, count: int
) -> None:
    limit = cost.bytes(4, EXPECTED)
    requests = crowd(count, 5)
    expected = await answers(roomy, requests)
    async with started(model, max_batch=16, kv_limit=limit, prefill_chunk=48) as engine:

        async def ask(i: int) -> object:
            # Some come when the first of those before them are well on their way.
            await asyncio.sleep(i * 0.01)
            rows: list[Row] = []
            with engine.generate([requests[i]]) as stream:
                async for _, row in stream.rows():
                    rows.append(row)
                    if i % 5 == 0 and len(rows) > 2 + 3 * i:
                        return None
            return told(rows)

        async with watched(engine) as watch:
            got = await asyncio.gather(*(ask(i) for i in range(count)))
    answered = [(i, answer) for i, answer in enumerate(got) if answer is not None]
    assert len(answered) >= count - count // 5 - 1
    assert all(answer == expected[i] for i, answer in answered)
    assert 0 < watch.most_kv <= limit


async def test_what_can_never_fit_is_refused_and_the_longest_that_fits_is_served(
    model: Path, cost: KvCost
) -> None:
    limit = cost.bytes(1, 300)
    async with started(model, kv_limit=limit) as engine:
        assert engine.ready is not None
        assert engine.ready.longest_sequence == 300
        with pytest.raises(EngineFailed, match="300"):
            await tokens_of(engine, request([3] * 300, 1))
        async with watched(engine) as watch:
            [tokens] = await tokens_of(engine, request([3] * 250, 1000))
        assert len(tokens) == 50
        assert watch.most_kv <= limit


async def test_a_model_whose_cache_holds_nothing_is_not_loaded(model: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="KV cache"):
        await DirectEngine.start("tiny", model, LoadOptions(kv_limit=1000))


async def test_callers_take_turns_in_a_full_engine(model: Path) -> None:
    order: list[str] = []
    async with started(model, max_batch=1) as engine:

        async def ask(name: str) -> None:
            await tokens_of(engine, request([5, 6, 7], 20, caller=name))
            order.append(name)

        names = ["flood"] * 40 + ["single"]
        await asyncio.gather(*(ask(name) for name in names))
    assert order.index("single") <= 3, "after the one that ran and the next in turn"


@pytest.mark.parametrize("rows", [1, 3])
def test_caches_never_take_more_than_their_cost(model: Path, cost: KvCost, rows: int) -> None:
    loaded, _ = load_model(model)
    caches = []
    for row in range(rows):
        cache = list(make_prompt_cache(loaded))
        for chunk in (100 + row, 1, 155, 3):
            loaded(mx.zeros((1, chunk), mx.int32), cache=cache)
            assert cache_bytes(cache) <= cost.bytes(1, cache[0].offset)
        caches.append(merge([cache]))
    batch = caches[0]
    for other in caches[1:]:
        batch = extend(batch, other)
    longest = 259 + rows - 1
    for step in range(300):
        loaded(mx.zeros((rows, 1), mx.int32), cache=batch)
        mx.eval([layer.state for layer in batch])
        assert cache_bytes(batch) <= cost.bytes(rows, longest + step + 1)
    assert cache_bytes(keep_rows(batch, [0])) <= cost.bytes(1, longest + 300)


def test_a_prompt_that_starts_over_is_scored_once() -> None:
    first = Sequence(Start(request([1, 2, 3], 5, prompt_logprobs=0), []), 100)
    assert first.prompt_logprobs is not None
    first.prompt_logprobs.append(None)  # half-way
    again = Sequence(first.restart(), 100)
    assert again.prompt_logprobs == [None]
    again.report([7], None)
    assert again.restart().request.prompt_logprobs is None


def test_the_limit_holds_after_every_single_turn(model: Path, cost: KvCost) -> None:
    memory = DeviceMemory("50%", None)
    limit = cost.bytes(4, EXPECTED)
    backend = Backend(model, LoadOptions(), memory)
    scheduler = Scheduler(
        backend,
        memory,
        PrefixCache(backend.layout, limit),
        max_batch=16,
        kv_limit=limit,
        prefill_chunk=64,
    )
    for number, one in enumerate(crowd(20, 6)):
        assert scheduler.add(msgspec.structs.replace(one, id=number)) is None
    ended = 0
    while scheduler.busy:
        for message in scheduler.turn():
            if isinstance(message, Begun):
                continue
            ended += sum(row.finish is not None for row in message.rows)
        stats = scheduler.stats()
        assert stats.kv_bytes + stats.prefix.bytes <= limit
    assert ended == 20
    assert scheduler.stats().preempted > 0
