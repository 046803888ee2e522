"""An engine whose device fails in the middle of its work goes on."""

import asyncio
import json
from pathlib import Path

import pytest

from mlx_server.engine.faults import MOST_IN_A_ROW
from mlx_server.engine.protocol import Sampling
from mlx_server.engine.schedule.backoff import LOWERED, RAISE_SECONDS, RAISED, KvBackoff
from mlx_server.engine.worker import DEVICE_GONE_CODE
from mlx_server.errors import EngineFailed
from tests.engine.conftest import idle, request, rows_of, started, tokens_of
from tests.support.tiny import build_tiny_model

POISON, LETHAL = 399, 398
MOST_ROWS = 3
OWN_CODE = f"""
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def __call__(self, inputs, cache=None, **more):
        rows, tokens = inputs.shape
        if tokens > 1 and {POISON} in inputs.tolist()[0]:
            raise RuntimeError("this prompt cannot be computed")
        if tokens > 1 and {LETHAL} in inputs.tolist()[0]:
            raise RuntimeError("cudaGraphLaunch() failed: an illegal memory access was encountered")
        if rows > {MOST_ROWS}:
            raise RuntimeError("[malloc] Unable to allocate 1234 bytes.")
        return super().__call__(inputs, cache, **more)
"""
REQUESTS = [
    request(range(i, i + 20), 30 + i, Sampling(seed=i, temperature=i % 2)) for i in range(1, 7)
]


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose device fails on one token of a prompt, on another for good, and on more than
    three rows.
    """
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "frail")
    (folder / "frail.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "frail.py"}))
    return folder


async def test_a_batch_that_is_too_large_for_the_memory_is_computed_in_parts(
    frail: Path,
) -> None:
    options = {"kv_limit": 4 << 20, "prefix_cache": "0", "trust_remote_code": True}
    async with started(frail, max_batch=MOST_ROWS, **options) as engine:
        expected = await tokens_of(engine, *REQUESTS)
    async with started(frail, steps_may_fail=True, max_batch=16, **options) as engine:
        assert await tokens_of(engine, *REQUESTS) == expected
        await idle(engine)
        assert await tokens_of(engine, *REQUESTS) == expected


async def test_a_request_that_the_device_cannot_compute_fails_alone(frail: Path) -> None:
    async with started(
        frail, steps_may_fail=True, trust_remote_code=True, max_batch=MOST_ROWS
    ) as engine:
        expected = await tokens_of(engine, *REQUESTS[:2])
        bad = request([*range(20), POISON, *range(20)], 5)
        with engine.generate([bad]) as poison:
            assert await tokens_of(engine, *REQUESTS[:2]) == expected
            with pytest.raises(EngineFailed, match="cannot be computed"):
                async for _ in poison.rows():
                    pass
        assert await tokens_of(engine, *REQUESTS[:2]) == expected


async def test_a_request_that_fails_by_itself_leaves_the_engine_as_it_was(frail: Path) -> None:
    async with started(frail, steps_may_fail=True, trust_remote_code=True) as engine:
        with pytest.raises(EngineFailed, match="cannot be computed"):
            await rows_of(engine, request([5, POISON, 7, 8], 5))
        await idle(engine)
        stats = engine.stats
        assert stats is not None
        assert (stats.kv_bytes, stats.running, stats.waiting) == (0, 0, 0)


@pytest.mark.parametrize(
    "prompts",
    [[[5, LETHAL, 7, 8]], [[5, POISON, 7, i] for i in range(MOST_IN_A_ROW)]],
    ids=["a device that is gone", "turns that fail in a row"],
)
async def test_an_engine_ends_when_its_device_computes_nothing_any_more(
    frail: Path, prompts: list[list[int]]
) -> None:
    async with started(frail, steps_may_fail=True, trust_remote_code=True) as engine:
        asked = (rows_of(engine, request(prompt, 5)) for prompt in prompts)
        failures = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(failure, EngineFailed) for failure in failures)
    told = [failure.message for failure in failures if f"code {DEVICE_GONE_CODE}" in str(failure)]
    assert told
    assert all("event=device_gone" in one for one in told)


def test_backoff_fades_while_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    backoff = KvBackoff(1.0)
    backoff.lower()
    backoff.lower()
    assert backoff.share == LOWERED**2
    now += RAISE_SECONDS
    assert backoff.share == LOWERED**2 * RAISED
    now += 10 * RAISE_SECONDS
    assert backoff.share == 1.0
