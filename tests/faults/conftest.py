"""Servers whose engines end in every way that can be thought of, and streams that are timed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server import Answer, Server, serving, stream_data, until
from tests.support.tiny import build_tiny_model

TINY = "tiny"
CONTEXT = 16_384
LIVELY = 30.0
"""Seconds within which anything at all must have happened, on a busy machine too."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context, slow enough for a client to keep up with eight streams."""
    folder = tmp_path_factory.mktemp("faults") / TINY
    return build_tiny_model(folder, context=CONTEXT, layers=2, hidden=256)


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    """A server whose engine may be killed at any time; nothing is kept, so that usage repeats."""
    with serving(tmp_path_factory.mktemp("home"), "--model", str(tiny), prefix_cache="0") as server:
        yield server


@dataclass
class TimedAnswer(Answer):
    """A stream's answer, and when each of its events came, in seconds of the monotonic clock."""

    moments: list[float] = field(default_factory=list)

    def pauses(self, kills: list[float]) -> list[float]:
        """For each kill amid the stream: the longest silence that began after the one before.

        Events may be on their way when an engine is killed, so the silence begins a little later.
        """
        gaps = list(pairwise(self.moments))
        longest = []
        for kill, following in pairwise([*kills, float("inf")]):
            during = [end - begin for begin, end in gaps if end > kill and begin < following]
            if during and self.moments[0] < kill:
                longest.append(max(during))
        return longest


async def read_timed(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], into: TimedAnswer | None = None
) -> TimedAnswer:
    """Read a stream to its end; it can be looked at in `into` meanwhile."""
    answer = TimedAnswer() if into is None else into
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for data in stream_data(response):
            answer.moments.append(time.monotonic())
            if data == "[DONE]":
                answer.done = True
            else:
                answer.take(json.loads(data))
    return answer


@asynccontextmanager
async def running(
    client: httpx.AsyncClient, *asked: tuple[str, dict[str, Any]]
) -> AsyncIterator[list[asyncio.Task[TimedAnswer]]]:
    """Streams that have all begun to say something."""
    answers = [TimedAnswer() for _ in asked]
    pairs = zip(asked, answers, strict=True)
    tasks = [asyncio.create_task(read_timed(client, *one, into)) for one, into in pairs]
    try:

        async def all_speak() -> bool:
            return all(any(answer.pieces) for answer in answers)

        await until(all_speak, LIVELY)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def state_of(server: Server, model: str = TINY) -> dict[str, Any]:
    """What the server says of a model."""
    return (await server.models())[model]


async def reaches(server: Server, state: str, model: str = TINY) -> None:
    """Wait until a model is in that state."""

    async def there() -> bool:
        return bool((await state_of(server, model))["state"] == state)

    await until(there, LIVELY, lambda: f"{model} was never {state}")


async def engine_of(server: Server, model: str = TINY, other_than: int | None = None) -> int:
    """The process id of a model's engine, once there is one that can generate."""
    pid: int | None = None

    async def there() -> bool:
        nonlocal pid
        pid = (await state_of(server, model))["pid"]
        return pid not in (None, other_than)

    await until(there, LIVELY, lambda: f"{model} has no engine")
    assert pid is not None
    return pid


async def loading_engine(server: Server, other_than: int) -> psutil.Process:
    """An engine process that has just been started in place of another."""
    found: list[psutil.Process] = []

    async def there() -> bool:
        nonlocal found
        found = [engine for engine in server.engines() if engine.pid != other_than]
        return bool(found)

    await until(there, LIVELY)
    return found[0]
