"""How long requests may wait for a model and take on it, and how many may do so."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_server.config import Settings
from mlx_server.errors import BadRequest, RequestTimeout, TooManyRequests, Unavailable
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.stream import RowStream

SHORTEST_RETRY = 1.0
LONGEST_RETRY = 60.0
"""Seconds between which a client is told to wait when a model's queue is full."""
NEWEST_WEIGHT = 0.1
"""Of the latest request in the average of how long requests take."""


class Admission:
    """The limits of the settings, and what it takes to tell a client when to come back."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._usual_seconds: dict[str, float] = {}

    def check_queue(self, model: LoadedModel, new: int) -> None:
        """Refuse `new` sequences that find no place in the batch nor in the queue before it."""
        places = self.settings.max_batch + self.settings.max_queue
        if new > places:
            raise BadRequest(
                f"You asked for {new} completions at once; this server takes {places}.",
                code="too_many_completions",
            )
        lacking = model.engine.in_flight + new - places
        if lacking > 0:
            usual = self._usual_seconds.get(model.id, 0.0)
            wait = usual * lacking / self.settings.max_batch
            raise TooManyRequests(
                f"The queue of the model `{model.id}` is full: {model.engine.in_flight} "
                f"requests run or wait, and there are {places} places.",
                retry_after=_bounded(wait),
            )

    @contextmanager
    def limited(
        self, streams: Sequence[RowStream], arrived: float, model_id: str
    ) -> Iterator[None]:
        """End `streams` when none of them begins in time, or when all takes too long.

        `arrived` is the event loop's time. Timers cost nothing per token, and work while nobody
        reads.
        """
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self.settings.queue_timeout, self._end_unbegun, streams, model_id),
            loop.call_at(arrived + self.settings.request_timeout, self._end_overdue, streams),
        ]
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    @contextmanager
    def timed(self, model_id: str) -> Iterator[None]:
        """Learn how long the requests of a model take."""
        started = time.monotonic()
        try:
            yield
        finally:
            taken = time.monotonic() - started
            usual = self._usual_seconds.get(model_id, taken)
            self._usual_seconds[model_id] = usual + NEWEST_WEIGHT * (taken - usual)

    def _end_unbegun(self, streams: Sequence[RowStream], model_id: str) -> None:
        if any(stream.begun for stream in streams):
            return
        error = Unavailable(
            f"The model `{model_id}` had no place for this request within "
            f"{self.settings.queue_timeout:g} seconds.",
            code="queue_timeout",
            retry_after=_bounded(self._usual_seconds.get(model_id, 0.0)),
        )
        for stream in streams:
            stream.fail(error)

    def _end_overdue(self, streams: Sequence[RowStream]) -> None:
        error = RequestTimeout(
            f"The request was not finished within {self.settings.request_timeout:g} seconds."
        )
        for stream in streams:
            stream.fail(error)


def _bounded(seconds: float) -> float:
    """When a client is told to come back, if so many seconds are expected."""
    return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)
