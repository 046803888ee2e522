"""How many requests may wait for a model, and how long."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_server.errors import BadRequest, Forbidden, RequestTimeout, TooManyRequests, Unavailable
from mlx_server.models.pool.stream import RowStream
from mlx_server.schemas.internal import Caller

MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
AVERAGE_WEIGHT = 0.1
"""Of the latest duration."""


def check_priority(caller: Caller, priority: int) -> None:
    """Raises Forbidden for a place before others that `caller` may not have."""
    if priority < 0 and not caller.admin:
        raise Forbidden("A `priority` below 0 needs an admin key.", param="priority")


class Backpressure:
    """Limits the queue and its time. `queue_timeout` is until the engine begins, `request_timeout`
    for everything, in seconds.
    """

    def __init__(
        self, *, max_batch: int, max_queue: int, queue_timeout: float, request_timeout: float
    ) -> None:
        self._max_batch = max_batch
        self._places = max_batch + max_queue
        self._queue_timeout = queue_timeout
        self._request_timeout = request_timeout
        self._average_seconds: dict[str, float] = {}

    def check_queue(self, model_id: str, in_flight: int, new: int) -> None:
        """Raise TooManyRequests if `new` sequences do not fit beside those `in_flight`, BadRequest
        if they never will.
        """
        if new > self._places:
            raise BadRequest(
                f"You asked for {new} completions at once; this server takes {self._places}.",
                code="too_many_completions",
            )
        excess = in_flight + new - self._places
        if excess > 0:
            average = self._average_seconds.get(model_id, 0.0)
            raise TooManyRequests(
                f"The queue of the model `{model_id}` is full: {in_flight} "
                f"requests run or wait, and there are {self._places} places.",
                retry_after=_retry_after(average * excess / self._max_batch),
            )

    @contextmanager
    def timeouts(
        self, streams: Sequence[RowStream], arrived: float, model_id: str
    ) -> Iterator[None]:
        """Fail `streams` if none begins in time or they take too long. `arrived` is the event
        loop's time. Timers also fire while nobody reads the streams.
        """
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self._queue_timeout, self._fail_unbegun, streams, model_id),
            loop.call_at(arrived + self._request_timeout, self._fail_overdue, streams),
        ]
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    @contextmanager
    def timed(self, model_id: str) -> Iterator[None]:
        """Record the model's request duration, for retry estimates."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            average = self._average_seconds.get(model_id, seconds)
            self._average_seconds[model_id] = average + AVERAGE_WEIGHT * (seconds - average)

    def _fail_unbegun(self, streams: Sequence[RowStream], model_id: str) -> None:
        if any(stream.begun for stream in streams):
            return
        error = Unavailable(
            f"The model `{model_id}` had no place for this request within "
            f"{self._queue_timeout:g} seconds.",
            code="queue_timeout",
            retry_after=_retry_after(self._average_seconds.get(model_id, 0.0)),
        )
        for stream in streams:
            stream.fail(error)

    def _fail_overdue(self, streams: Sequence[RowStream]) -> None:
        error = RequestTimeout(
            f"The request was not finished within {self._request_timeout:g} seconds."
        )
        for stream in streams:
            stream.fail(error)


def _retry_after(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
