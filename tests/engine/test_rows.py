"""Rows as a reader gets them who comes late."""

from mlx_server.models.pool.stream import MAX_ROWS_TOGETHER
from tests.engine.conftest import request, rows_of, until
from tests.support.engines import DirectEngine

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
COUNTS = [4, 9, 6]


async def test_rows_that_wait_come_at_once_and_in_order(engine: DirectEngine) -> None:
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


async def test_rows_that_wait_for_a_request_given_up_are_dropped(engine: DirectEngine) -> None:
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


async def test_many_rows_that_wait_come_in_bounded_numbers(engine: DirectEngine) -> None:
    with engine.generate([request(PROMPTS[0], 2 * MAX_ROWS_TOGETHER + 5)]) as stream:
        await until(lambda: engine.in_flight == 0)
        sizes = [len(list(rows)) async for rows in stream.arrivals()]
    assert sizes == [MAX_ROWS_TOGETHER, MAX_ROWS_TOGETHER, 5]
