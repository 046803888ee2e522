"""Engines over tiny models with random weights, on whatever device MLX has."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from mlx_server.engine import loading
from mlx_server.engine.protocol import Generate, LoadOptions, Row, Sampling
from mlx_server.engine.spawn import Child, spawn
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_model

StartEngine = Callable[..., AbstractAsyncContextManager[DirectEngine]]

GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def _own_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded in this process must not lower the priority of later tests."""
    monkeypatch.setattr(loading, "give_way", lambda: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=512)


@asynccontextmanager
async def started(
    path: Path,
    *,
    adapter: Path | None = None,
    guesses_always: bool = False,
    steps_may_fail: bool = False,
    **options: object,
) -> AsyncIterator[DirectEngine]:
    """An engine that ends with the block. Recovery hides a failed step, so here it is an error.

    `guesses_always`: whenever it can, whether that pays or not.
    """
    if guesses_always:
        options["speculation"] = "auto"
    client = await DirectEngine.start(
        "tiny",
        path,
        LoadOptions(**options),
        adapter,
        spawn=_spawn_guessing if guesses_always else spawn,
    )
    try:
        yield client
    finally:
        await client.stop()
    said = list(client.last_lines)
    assert steps_may_fail or not any("event=step_failed" in line for line in said), said


async def _spawn_guessing(module: str, sockets: Sequence[socket.socket]) -> Child:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        return await spawn("tests.support.guessing", sockets)


@pytest.fixture(scope="session")
async def engine(tiny_model: Path) -> AsyncIterator[DirectEngine]:
    async with started(tiny_model, prefill_chunk=16) as client:
        yield client


def request(
    prompt: Sequence[int], max_tokens: int = 20, sampling: Sampling = GREEDY, **more: object
) -> Generate:
    return Generate(0, list(prompt), sampling, max_tokens, **more)


async def rows_of(client: DirectEngine, *requests: Generate) -> list[list[Row]]:
    """All rows of each request, sent together."""
    rows: list[list[Row]] = [[] for _ in requests]
    with client.generate(list(requests)) as stream:
        async for index, row in stream.rows():
            rows[index].append(row)
    return rows


async def tokens_of(client: DirectEngine, *requests: Generate) -> list[list[int]]:
    """The completion of each request, sent together."""
    return [
        [token for row in rows for token in row.tokens] for rows in await rows_of(client, *requests)
    ]


async def until(condition: object, seconds: float = 5.0) -> float:
    """Wait for `condition()`; returns how long it took."""
    started_at = time.monotonic()
    while not condition():
        assert time.monotonic() - started_at < seconds, "waited in vain"
        await asyncio.sleep(0.01)
    return time.monotonic() - started_at


async def idle(engine: DirectEngine) -> None:
    def quiet() -> bool:
        s = engine.stats if engine.up_to_date else None
        return s is not None and (s.running, s.prefilling, s.waiting) == (0, 0, 0)

    await until(quiet)
