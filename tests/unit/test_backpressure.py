"""How many requests may wait for a model, and for how long."""

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from mlx_server.engine.protocol import Row
from mlx_server.errors import BadRequest, RequestTimeout, TooManyRequests, Unavailable
from mlx_server.models.pool.stream import RowStream
from mlx_server.services import backpressure as module
from mlx_server.services.backpressure import Backpressure

LONG = 60.0
SHORT = 0.01


class Engine:
    """Remembers what was given up."""

    def __init__(self) -> None:
        self.aborted: set[int] = set()

    def abort(self, ids: Iterable[int]) -> None:
        self.aborted |= set(ids)

    def pause(self, ids: Iterable[int]) -> None:
        raise AssertionError("nothing is paused")

    resume = pause


def limits(*, queue_timeout: float = LONG, request_timeout: float = LONG) -> Backpressure:
    return Backpressure(
        max_batch=2, max_queue=3, queue_timeout=queue_timeout, request_timeout=request_timeout
    )


async def rows(stream: RowStream) -> list[Row]:
    return [row async for _, row in stream.rows()]


@pytest.mark.parametrize(("in_flight", "new"), [(0, 1), (0, 5), (4, 1), (2, 3)])
def test_sequences_are_taken_up_to_the_batch_and_its_queue(in_flight: int, new: int) -> None:
    limits().check_queue("m", in_flight, new)


@pytest.mark.parametrize(("in_flight", "new"), [(5, 1), (1, 5), (9, 1)])
def test_a_full_queue_refuses_with_a_time_to_retry(in_flight: int, new: int) -> None:
    with pytest.raises(TooManyRequests, match="there are 5 places") as caught:
        limits().check_queue("m", in_flight, new)
    assert caught.value.retry_after == module.MIN_RETRY_SECONDS


def test_more_than_an_idle_model_takes_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="this server takes 5"):
        limits().check_queue("m", 0, 6)


def retry_after(backpressure: Backpressure, model: str, in_flight: int) -> float | None:
    with pytest.raises(TooManyRequests) as caught:
        backpressure.check_queue(model, in_flight, 1)
    return caught.value.retry_after


def test_the_time_to_retry_follows_how_long_the_models_requests_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    backpressure = limits()
    with backpressure.timed("slow"):
        now += 10
    # One place too few, and two requests end every ten seconds.
    assert retry_after(backpressure, "slow", 5) == 5
    assert retry_after(backpressure, "slow", 8) == 20
    assert retry_after(backpressure, "slow", 100) == module.MAX_RETRY_SECONDS
    assert retry_after(backpressure, "other", 8) == module.MIN_RETRY_SECONDS
    with backpressure.timed("slow"):
        now += 20
    assert retry_after(backpressure, "slow", 5) == pytest.approx(5.5)


async def test_streams_that_do_not_begin_in_time_fail() -> None:
    engine = Engine()
    streams = [RowStream(engine, range(2)), RowStream(engine, range(2, 3))]
    with limits(queue_timeout=SHORT).timeouts(streams, asyncio.get_running_loop().time(), "m"):
        for stream in streams:
            with pytest.raises(Unavailable, match=r"no place .* within 0.01 seconds") as caught:
                await rows(stream)
            assert caught.value.code == "queue_timeout"
    assert engine.aborted == {0, 1, 2}


async def test_one_stream_that_began_keeps_all_from_failing_until_the_request_takes_too_long() -> (
    None
):
    engine = Engine()
    streams = [RowStream(engine, range(1)), RowStream(engine, range(1, 2))]
    streams[0].begin()
    backpressure = limits(queue_timeout=SHORT, request_timeout=3 * SHORT)
    with backpressure.timeouts(streams, asyncio.get_running_loop().time(), "m"):
        for stream in streams:
            with pytest.raises(RequestTimeout, match=r"within 0.03 seconds"):
                await rows(stream)


async def test_the_time_that_the_model_took_to_load_counts_for_the_request() -> None:
    stream = RowStream(Engine(), range(1))
    arrived = asyncio.get_running_loop().time() - LONG
    with limits().timeouts([stream], arrived, "m"), pytest.raises(RequestTimeout):
        await rows(stream)


async def test_nothing_fails_after_the_request_has_ended() -> None:
    engine = Engine()
    stream = RowStream(engine, range(1))
    arrived = asyncio.get_running_loop().time()
    with limits(queue_timeout=SHORT, request_timeout=SHORT).timeouts([stream], arrived, "m"):
        pass
    fired = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * SHORT, fired.set)
    await fired.wait()
    assert engine.aborted == set()
