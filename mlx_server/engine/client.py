"""The front's handle on one engine process: start it, send it requests, stop it.

What happens to a request when its engine ends is told in `models/pool/supervisor.py`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import msgspec

from mlx_server.engine.protocol import (
    Abort,
    Begun,
    Embed,
    Embedding,
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
from mlx_server.errors import EngineFailed, LoadCrashed, ModelLoadFailed, ServerError
from mlx_server.events import event

RECEIVE_BYTES = 1 << 18
KEPT_LOG_LINES = 50
STOP_SECONDS = 5.0
EXIT_SECONDS = 1.0
"""What an engine whose socket has closed gets to exit by itself, which tells more of its end."""
MOST_TOGETHER = 64
"""Rows that a stream hands over at once, which its reader works through without a pause."""
MOST_UNREAD = 2048
"""Tokens and alternatives to them, for each request of a stream, that may wait for a reader before
the stream is paused: half a megabyte."""

log = logging.getLogger("mlx_server.engine")


class Recipient(Protocol):
    """Whoever is told what an engine has for a request."""

    def begin(self) -> None:
        """The engine is about to work on it."""

    def put(self, item: "Row | Failed | EngineFailed") -> None:
        """The next row, or why there will be none: the request failed, or the engine ended."""


class EngineClient:
    """One engine process and the requests it holds.

    Create it with `EngineClient.start`. What comes for a request goes to its recipient, and so
    does the engine's end, as an `EngineFailed`.
    """

    def __init__(self, model_id: str, child: Child) -> None:
        self.model_id = model_id
        self.process = child.process
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.last_lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
        self.closed = asyncio.Event()
        self.heard = 0
        """How often something has come from the engine."""
        self._child = child
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._recipients: dict[int, Recipient] = {}
        self._next_id = 0
        assert child.process.stderr is not None
        self._log_relay = asyncio.create_task(self._relay_log(child.process.stderr))
        self._receiver = asyncio.create_task(self._receive(child.reader))

    @classmethod
    async def start(
        cls,
        model_id: str,
        path: Path,
        options: LoadOptions,
        adapter_path: Path | None = None,
        embedding: Embedding | None = None,
    ) -> "EngineClient":
        """Start an engine with a fresh interpreter and wait until it has loaded `path`.

        Raises ModelLoadFailed when it cannot, LoadCrashed when it ended without a word. However
        this ends, by cancellation too, no process is left behind that is not returned.
        """
        client = cls(model_id, await spawn("mlx_server.engine.worker"))
        try:
            adapter = str(adapter_path) if adapter_path else None
            client._send(Load(str(path), options, adapter, embedding))
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
        return len(self._recipients)

    def generate(self, requests: Sequence[Generate | Embed]) -> "RowStream":
        """Send `requests` at once, under ids of our own; returns the stream of their rows.

        Raises EngineFailed when the engine has ended.
        """
        if not self.alive:
            raise EngineFailed(self.obituary)
        ids = range(self._next_id, self._next_id + len(requests))
        self._next_id = ids.stop
        stream = RowStream(self, ids)
        for id_, request in zip(ids, requests, strict=True):
            self.submit(msgspec.structs.replace(request, id=id_), stream)
        return stream

    def submit(self, request: Generate | Embed, recipient: Recipient) -> None:
        """Send `request` under the id it has. An engine that has ended never answers."""
        self._recipients[request.id] = recipient
        self._send(request)

    def abort(self, ids: Iterable[int]) -> None:
        """Give up those of these requests that have not ended."""
        open_ids = [id_ for id_ in ids if self._recipients.pop(id_, None) is not None]
        if open_ids:
            self._send(Abort(open_ids))

    def pause(self, ids: Iterable[int]) -> None:
        """Do nothing: an engine by itself cannot go on with what it has let go of."""

    def resume(self, ids: Iterable[int]) -> None:
        """Do nothing, as `pause` does."""

    async def stop(self) -> None:
        """Ask the engine to end, and make sure that it does."""
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
        await asyncio.wait([self._receiver])
        self._log_relay.cancel()  # a process that the engine started may still hold its end
        ended = await asyncio.gather(self._receiver, self._log_relay, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                log.error(event("engine_protocol", model=self.model_id, error=repr(error)))

    @property
    def how_it_ended(self) -> str:
        """The signal or the exit code that ended the process."""
        code = self.process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    @property
    def obituary(self) -> str:
        """That and how the engine ended, in a sentence."""
        return f"The engine of model `{self.model_id}` ended ({self.how_it_ended})."

    def _send(self, message: ToEngine) -> None:
        data = frame(message)
        if not self._child.writer.is_closing():  # else the engine is gone, as will soon be noticed
            self._child.writer.write(data)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Hand every message to whom it concerns, until the engine's end of the socket closes."""
        frames = FrameReader()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                self.heard += 1
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
            case Begun(ids=ids):
                for id_ in ids:
                    if id_ in self._recipients:
                        self._recipients[id_].begin()
            case Failed(id=id_):
                self._pass_on(id_, message, ended=True)
            case Stats():
                self.stats = message
            case Ready():
                self._loaded.set_result(message)
            case LoadFailed(message=reason):
                self._loaded.set_exception(ModelLoadFailed(reason))

    def _pass_on(self, id_: int, item: Row | Failed, *, ended: bool) -> None:
        held = self._recipients
        recipient = held.pop(id_, None) if ended else held.get(id_)
        if recipient is not None:  # else it was aborted while this was on its way
            recipient.put(item)

    async def _end(self) -> None:
        """The engine is gone: tell everybody who waits for it."""
        self.closed.set()
        try:
            async with asyncio.timeout(EXIT_SECONDS):
                await self.process.wait()
                await asyncio.wait([self._log_relay])
        except TimeoutError:
            await self._child.kill()
        recipients, self._recipients = self._recipients, {}
        for recipient in set(recipients.values()):
            recipient.put(EngineFailed(self.obituary))
        if not self._loaded.done():
            self._loaded.set_exception(LoadCrashed(self.obituary, self.last_lines))
            # Whoever started this engine may have been cancelled and never ask.
            self._loaded.exception()

    async def _relay_log(self, stderr: asyncio.StreamReader) -> None:
        while line := await next_line(stderr):
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            log.info(event("engine_log", model=self.model_id, pid=self.pid, line=text))


class Holder(Protocol):
    """Whoever has requests worked on."""

    def abort(self, ids: Iterable[int]) -> None:
        """Give up those of these requests that have not ended."""

    def pause(self, ids: Iterable[int]) -> None:
        """Stop to work on these for now."""

    def resume(self, ids: Iterable[int]) -> None:
        """Go on with these."""


class RowStream:
    """The rows of the requests sent together, as they come, until each has finished.

    Use it as a context manager: leaving the block early aborts what still runs. While too much
    waits for the reader, the requests are paused.
    """

    def __init__(self, holder: Holder, ids: range) -> None:
        self.begun = False
        """Whether an engine has begun to work on one of the requests."""
        self.ids = ids
        self._holder = holder
        self._open = set(ids)
        self._items: deque[Row | Failed | ServerError] = deque()
        self._arrived = asyncio.Event()
        self._unread = 0
        self._paused = False

    def begin(self) -> None:
        """Called when the engine begins with one of the requests."""
        self.begun = True

    def put(self, item: Row | Failed | ServerError) -> None:
        """Called with what arrived."""
        self._items.append(item)
        self._arrived.set()
        if isinstance(item, Row):
            self._unread += _size(item)
            if self._unread > MOST_UNREAD * len(self.ids) and not self._paused:
                self._paused = True
                self._holder.pause(self._open)

    def fail(self, error: ServerError) -> None:
        """Give up what still runs; `error` comes after the rows that are here."""
        self._holder.abort(self._open)
        self._items.append(error)
        self._arrived.set()

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.abort(self._open)

    def abort(self, index: int) -> None:
        """Give up the request at `index` of those sent; no more rows come for it."""
        id_ = self.ids[index]
        self._open.discard(id_)
        self._holder.abort([id_])

    async def rows(self) -> AsyncIterator[tuple[int, Row]]:
        """Pairs of a request's index among those sent, and its next row.

        Raises EngineFailed when one of the requests fails or the engine ends, and whatever else
        ended the stream.
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
                self._go_on()
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
            self._unread -= _size(row)
            if row.id in self._open:
                if row.finish is not None:
                    self._open.discard(row.id)
                yield row.id - self.ids.start, row

    def _go_on(self) -> None:
        """The reader has caught up."""
        if self._paused:
            self._paused = False
            self._holder.resume(self._open)

    def _raise(self, failure: Failed | ServerError) -> None:
        if isinstance(failure, ServerError):
            raise failure
        if failure.id in self._open:
            raise EngineFailed(failure.message)


def _size(row: Row) -> int:
    """Tokens of a row, and alternatives to them."""
    return len(row.tokens) + sum(len(entry.top) for entry in row.logprobs or ())
