"""The front's handle on one engine process: start it, send it requests, stop it."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from mlx_server.engine.protocol import (
    Abort,
    Failed,
    FrameReader,
    Generate,
    Load,
    LoadFailed,
    LoadOptions,
    Ready,
    Row,
    Stats,
    Stop,
    ToEngine,
    ToFront,
    Tokens,
    decode_to_front,
    frame,
)
from mlx_server.engine.spawn import Child, next_line, spawn
from mlx_server.errors import EngineFailed, ModelLoadFailed
from mlx_server.telemetry import event

RECEIVE_BYTES = 1 << 18
KEPT_LOG_LINES = 50
STOP_SECONDS = 5.0
MOST_TOGETHER = 64
"""Rows that a stream hands over at once, which its reader works through without a pause."""

log = logging.getLogger("mlx_server.engine")


class EngineClient:
    """One engine process and the requests it holds.

    Create it with `EngineClient.start`. Every request gets a stream of rows of its own; the
    engine's end reaches each of them as an `EngineFailed`.
    """

    def __init__(self, model_id: str, child: Child) -> None:
        self.model_id = model_id
        self.process = child.process
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.last_lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
        self.closed = asyncio.Event()
        self._child = child
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._streams: dict[int, RowStream] = {}
        self._next_id = 0
        assert child.process.stderr is not None
        self._tasks = [
            asyncio.create_task(self._receive(child.reader)),
            asyncio.create_task(self._relay_log(child.process.stderr)),
        ]

    @classmethod
    async def start(
        cls, model_id: str, path: Path, options: LoadOptions, adapter_path: Path | None = None
    ) -> "EngineClient":
        """Start an engine with a fresh interpreter and wait until it has loaded `path`.

        Raises ModelLoadFailed when it cannot. However this ends, by cancellation too, no process
        is left behind that is not returned.
        """
        client = cls(model_id, await spawn("mlx_server.engine.worker"))
        try:
            client._send(Load(str(path), options, str(adapter_path) if adapter_path else None))
            client.ready = await client._loaded
        except BaseException:
            await client.kill()
            raise
        return client

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    @property
    def in_flight(self) -> int:
        """Requests that wait for tokens."""
        return len(self._streams)

    def generate(self, requests: list[Generate]) -> "RowStream":
        """Send `requests` at once, under ids of our own; returns the stream of their rows.

        Raises EngineFailed when the engine has ended.
        """
        if not self.alive:
            raise EngineFailed(self._obituary())
        ids = range(self._next_id, self._next_id + len(requests))
        self._next_id = ids.stop
        stream = RowStream(self, ids)
        for id_, request in zip(ids, requests, strict=True):
            self._streams[id_] = stream
            self._send(msgspec.structs.replace(request, id=id_))
        return stream

    def abort(self, ids: Iterable[int]) -> None:
        """Give up those of these requests that have not ended."""
        open_ids = [id_ for id_ in ids if self._streams.pop(id_, None) is not None]
        if open_ids and self.alive:
            self._send(Abort(open_ids))

    async def stop(self) -> None:
        """Ask the engine to end, and make sure that it does."""
        if self.alive:
            self._send(Stop())
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            log.warning(event("engine_stop_timeout", model=self.model_id, pid=self.pid))
        await self.kill()

    async def kill(self) -> None:
        """End the process now and let go of everything held for it."""
        await self._child.kill()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                log.error(event("engine_protocol", model=self.model_id, error=repr(error)))

    def _send(self, message: ToEngine) -> None:
        self._child.writer.write(frame(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Hand every message to whom it concerns, until the engine's end of the socket closes."""
        frames = FrameReader()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                for body in frames.feed(data):
                    self._deliver(decode_to_front(body))
        except ConnectionError as error:
            log.info(event("engine_connection_lost", model=self.model_id, error=error))
        finally:
            await self._end()

    def _deliver(self, message: ToFront) -> None:
        if isinstance(message, Ready | LoadFailed) and self._loaded.done():
            return  # whoever started the engine has given up
        match message:
            case Tokens(rows=rows):
                for row in rows:
                    self._pass_on(row.id, row, ended=row.finish is not None)
            case Failed(id=id_):
                self._pass_on(id_, message, ended=True)
            case Stats():
                self.stats = message
            case Ready():
                self._loaded.set_result(message)
            case LoadFailed(message=reason):
                self._loaded.set_exception(ModelLoadFailed(reason))

    def _pass_on(self, id_: int, item: Row | Failed, *, ended: bool) -> None:
        stream = self._streams.pop(id_, None) if ended else self._streams.get(id_)
        if stream is not None:  # else it was aborted while this was on its way
            stream.put(item)

    async def _end(self) -> None:
        """The engine is gone: tell everybody who waits for it."""
        self.closed.set()
        await self.process.wait()
        streams, self._streams = self._streams, {}
        for stream in set(streams.values()):
            stream.put(EngineFailed(self._obituary()))
        if not self._loaded.done():
            self._loaded.set_exception(ModelLoadFailed(self._obituary()))
            # Whoever started this engine may have been cancelled and never ask.
            self._loaded.exception()

    def _obituary(self) -> str:
        code = self.process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"The engine of model `{self.model_id}` ended ({how})."

    async def _relay_log(self, stderr: asyncio.StreamReader) -> None:
        while line := await next_line(stderr):
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            log.info(event("engine_log", model=self.model_id, pid=self.pid, line=text))


class RowStream:
    """The rows of the requests sent together, as they come, until each has finished.

    Use it as a context manager: leaving the block early aborts what still runs.
    """

    def __init__(self, client: EngineClient, ids: range) -> None:
        self._client = client
        self._ids = ids
        self._open = set(ids)
        self._items: deque[Row | Failed | EngineFailed] = deque()
        self._arrived = asyncio.Event()

    def put(self, item: Row | Failed | EngineFailed) -> None:
        """Called by the client with what arrived."""
        self._items.append(item)
        self._arrived.set()

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.abort(self._open)

    def abort(self, index: int) -> None:
        """Give up the request at `index` of those sent; no more rows come for it."""
        id_ = self._ids[index]
        self._open.discard(id_)
        self._client.abort([id_])

    async def rows(self) -> AsyncIterator[tuple[int, Row]]:
        """Pairs of a request's index among those sent, and its next row.

        Raises EngineFailed when one of the requests fails or the engine ends.
        """
        async for together in self.arrivals():
            for pair in together:
                yield pair

    async def arrivals(self) -> AsyncIterator[Iterator[tuple[int, Row]]]:
        """The same pairs, those together that are here when one is looked for.

        A reader who falls behind gets more at a time, within bounds, and so can catch up.
        """
        while self._open:
            if not self._items:
                self._arrived.clear()
                await self._arrived.wait()
            elif isinstance(first := self._items[0], Row):
                yield islice(self._rows_here(), MOST_TOGETHER)
            else:
                self._items.popleft()
                self._raise(first)

    def _rows_here(self) -> Iterator[tuple[int, Row]]:
        """The rows that need no waiting, up to a failure."""
        while self._items and isinstance(row := self._items[0], Row):
            self._items.popleft()
            if row.id in self._open:
                if row.finish is not None:
                    self._open.discard(row.id)
                yield row.id - self._ids.start, row

    def _raise(self, failure: Failed | EngineFailed) -> None:
        if isinstance(failure, EngineFailed):
            raise failure
        if failure.id in self._open:
            raise EngineFailed(failure.message)
