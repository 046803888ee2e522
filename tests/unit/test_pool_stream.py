"""Rows as their reader gets them: in order, bounded, up to a failure."""

import asyncio
from collections.abc import Iterable

import pytest

from mlx_server.engine.protocol import Failed, Row
from mlx_server.errors import EngineFailed, Unavailable
from mlx_server.models.pool import stream as stream_module
from mlx_server.models.pool.stream import RowStream
from tests.support.pool import settled


class Producer:
    """Notes what the stream asks for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    def abort(self, ids: Iterable[int]) -> None:
        self.asked.append(("abort", sorted(ids)))

    def pause(self, ids: Iterable[int]) -> None:
        self.asked.append(("pause", sorted(ids)))

    def resume(self, ids: Iterable[int]) -> None:
        self.asked.append(("resume", sorted(ids)))


async def collect(stream: RowStream, into: list[tuple[int, list[int]]]) -> None:
    async for index, row in stream.rows():
        into.append((index, row.tokens))


async def test_rows_come_by_index_until_all_have_finished() -> None:
    stream = RowStream(Producer(), range(7, 9))
    for row in (Row(8, [1]), Row(7, [2], "stop"), Row(8, [3], "length")):
        stream.put(row)
    got: list[tuple[int, list[int]]] = []
    await collect(stream, got)
    assert got == [(1, [1]), (0, [2]), (1, [3])]


async def test_a_failure_comes_after_the_rows_before_it() -> None:
    producer = Producer()
    stream = RowStream(producer, range(2))
    stream.put(Row(0, [1], "stop"))
    stream.put(Row(1, [2]))
    stream.fail(Unavailable("the engine has ended"))
    got: list[tuple[int, list[int]]] = []
    with pytest.raises(Unavailable, match="has ended"):
        await collect(stream, got)
    assert got == [(0, [1]), (1, [2])]
    assert producer.asked == [("abort", [0, 1])]


async def test_a_request_that_fails_ends_the_stream_unless_it_was_given_up() -> None:
    stream = RowStream(Producer(), range(2))
    stream.abort(0)
    stream.put(Failed(0, "of no interest"))
    stream.put(Failed(1, "cannot be computed"))
    with pytest.raises(EngineFailed, match="cannot be computed"):
        await collect(stream, [])


async def test_leaving_early_aborts_what_still_runs() -> None:
    producer = Producer()
    with RowStream(producer, range(3)) as stream:
        stream.put(Row(1, [1], "stop"))
        async for _ in stream.rows():
            break
    assert producer.asked == [("abort", [0, 2])]


async def test_a_reader_that_falls_behind_pauses_the_requests_until_it_has_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MAX_UNREAD", 10)
    producer = Producer()
    stream = RowStream(producer, range(1))
    for token in range(11):
        assert producer.asked == []
        stream.put(Row(0, [token]))
    assert producer.asked == [("pause", [0])]
    got: list[tuple[int, list[int]]] = []
    reader = asyncio.create_task(collect(stream, got))
    await settled(lambda: len(got) == 11)
    assert producer.asked == [("pause", [0]), ("resume", [0])]
    stream.put(Row(0, [], "stop"))
    await reader
