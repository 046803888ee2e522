"""Rows as a reader gets them who comes late."""

from pathlib import Path

import pytest

from mlx_server.engine.client import MOST_TOGETHER, EngineClient, RowStream
from mlx_server.errors import EngineFailed
from tests.engine.conftest import request, rows_of, started, until

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
COUNTS = [4, 9, 6]


async def test_rows_that_wait_come_at_once_and_in_order(engine: EngineClient) -> None:
    requests = [request(prompt, count) for prompt, count in zip(PROMPTS, COUNTS, strict=True)]
    wanted = await rows_of(engine, *requests)
    with engine.generate(requests) as stream:
        await until(lambda: engine.in_flight == 0)
        [together] = [list(rows) async for rows in stream.arrivals()]
    for index, rows in enumerate(wanted):
        got = [row for i, row in together if i == index]
        assert [(row.tokens, row.finish) for row in got] == [
            (row.tokens, row.finish) for row in rows
        ]


async def test_rows_that_wait_for_a_request_given_up_are_dropped(engine: EngineClient) -> None:
    requests = [request(PROMPTS[0], 8), request(PROMPTS[1], 8)]
    with engine.generate(requests) as stream:
        await until(lambda: engine.in_flight == 0)
        seen = []
        async for index, _ in stream.rows():
            seen.append(index)
            if index == 0:
                stream.abort(0)
    assert seen.count(0) == 1
    assert seen.count(1) == 8


async def test_a_failure_comes_after_the_rows_before_it(tiny_model: Path) -> None:
    async with started(tiny_model) as engine:
        requests = [request(PROMPTS[0], 3), request(PROMPTS[1], 400)]
        with engine.generate(requests) as stream:
            await until(lambda: engine.in_flight == 1)
            await engine.kill()
            got: list[tuple[int, str | None]] = []
            with pytest.raises(EngineFailed):
                await _collect(stream, got)
    assert (0, "length") in got
    assert (1, None) in got


async def _collect(stream: RowStream, into: list[tuple[int, str | None]]) -> None:
    async for index, row in stream.rows():
        into.append((index, row.finish))


async def test_many_rows_that_wait_come_in_bounded_numbers(engine: EngineClient) -> None:
    with engine.generate([request(PROMPTS[0], 2 * MOST_TOGETHER + 5)]) as stream:
        await until(lambda: engine.in_flight == 0)
        sizes = [len(list(rows)) async for rows in stream.arrivals()]
    assert sizes == [MOST_TOGETHER, MOST_TOGETHER, 5]
