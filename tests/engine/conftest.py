"""Engines over tiny models with random weights, on whatever device MLX has."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Generate, LoadOptions, Row, Sampling
from tests.support.tiny import build_tiny_model

StartEngine = Callable[..., AbstractAsyncContextManager[EngineClient]]

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=512)


@asynccontextmanager
async def started(path: Path, **options: object) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start("tiny", path, LoadOptions(**options))
    try:
        yield client
    finally:
        await client.stop()


@pytest.fixture(scope="session")
async def engine(tiny_model: Path) -> AsyncIterator[EngineClient]:
    async with started(tiny_model, prefill_chunk=16) as client:
        yield client


def request(
    prompt: Sequence[int], max_tokens: int = 20, sampling: Sampling = GREEDY, **more: object
) -> Generate:
    return Generate(0, list(prompt), sampling, max_tokens, **more)


async def rows_of(client: EngineClient, *requests: Generate) -> list[list[Row]]:
    """All rows of each request, sent together."""
    rows: list[list[Row]] = [[] for _ in requests]
    with client.generate(list(requests)) as stream:
        async for index, row in stream.rows():
            rows[index].append(row)
    return rows


async def tokens_of(client: EngineClient, *requests: Generate) -> list[list[int]]:
    """The completion of each request, sent together."""
    return [
        [token for row in rows for token in row.tokens] for rows in await rows_of(client, *requests)
    ]
