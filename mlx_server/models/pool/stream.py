"""Rows from an engine to a reader, with backpressure."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Protocol

from mlx_server.engine.protocol import Failed, Row
from mlx_server.errors import EngineFailed, ServerError

MAX_ROWS_TOGETHER = 64
"""Rows per hand-over, read without a pause."""
MAX_UNREAD = 2048
"""Unread tokens and alternatives per request that pause a stream (0.5 MB)."""


class Producer(Protocol):
    def abort(self, ids: Iterable[int]) -> None: ...

    def pause(self, ids: Iterable[int]) -> None: ...

    def resume(self, ids: Iterable[int]) -> None: ...


class Watcher(Protocol):
    def begun(self) -> None:
        """An engine starts on one of the requests, or starts again."""

    def row(self, index: int, row: Row) -> None:
        """One has come, read or not."""

    def paused(self) -> None:
        """The reader is too far behind."""

    def engine_ended(self) -> None:
        """While it worked on a request; another engine goes on."""


class Unwatched:
    def begun(self) -> None: ...

    def row(self, index: int, row: Row) -> None: ...

    def paused(self) -> None: ...

    def engine_ended(self) -> None: ...


UNWATCHED = Unwatched()


class RowStream:
    """The rows of requests sent together, until each has finished. A context manager: leaving early
    aborts the rest.
    """

    def __init__(self, producer: Producer, ids: range, watcher: Watcher = UNWATCHED) -> None:
        self.begun_at: float | None = None
        self.ids = ids
        self.watcher = watcher
        self._producer = producer
        self._open = set(ids)
        self._items: deque[Row | Failed | ServerError] = deque()
        self._arrived = asyncio.Event()
        self._unread = 0
        self._paused = False

    @property
    def begun(self) -> bool:
        return self.begun_at is not None

    def begin(self) -> None:
        if self.begun_at is None:
            self.begun_at = time.monotonic()
        self.watcher.begun()

    def put(self, item: Row | Failed) -> None:
        self._items.append(item)
        self._arrived.set()
        if isinstance(item, Row):
            self.watcher.row(item.id - self.ids.start, item)
            self._unread += _size(item)
            if self._unread > MAX_UNREAD * len(self.ids) and not self._paused:
                self._paused = True
                self.watcher.paused()
                self._producer.pause(self._open)

    def fail(self, error: ServerError) -> None:
        """Abort what runs; the reader gets `error` after pending rows."""
        self._producer.abort(self._open)
        self._items.append(error)
        self._arrived.set()

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.abort(self._open)

    def abort(self, index: int) -> None:
        id_ = self.ids[index]
        self._open.discard(id_)
        self._producer.abort([id_])

    async def rows(self) -> AsyncIterator[tuple[int, Row]]:
        """(index, row) pairs. Raises EngineFailed for a failed request, or the stream's error."""
        async for together in self.arrivals():
            for pair in together:
                yield pair

    async def arrivals(self) -> AsyncIterator[Iterator[tuple[int, Row]]]:
        """As `rows`, but batches what is pending, so that slow readers catch up."""
        while self._open:
            if not self._items:
                self._caught_up()
                self._arrived.clear()
                await self._arrived.wait()
            elif isinstance(first := self._items[0], Row):
                yield islice(self._buffered_rows(), MAX_ROWS_TOGETHER)
            else:
                self._items.popleft()
                self._raise(first)

    def _buffered_rows(self) -> Iterator[tuple[int, Row]]:
        while self._items and isinstance(row := self._items[0], Row):
            self._items.popleft()
            self._unread -= _size(row)
            if row.id in self._open:
                if row.finish is not None:
                    self._open.discard(row.id)
                yield row.id - self.ids.start, row

    def _caught_up(self) -> None:
        if self._paused:
            self._paused = False
            self._producer.resume(self._open)

    def _raise(self, failure: Failed | ServerError) -> None:
        if isinstance(failure, ServerError):
            raise failure
        if failure.id in self._open:
            raise EngineFailed(failure.message)


def _size(row: Row) -> int:
    return len(row.tokens) + sum(len(entry.top) for entry in row.logprobs or ())
