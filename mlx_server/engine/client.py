"""The front's handle on one engine process."""

import asyncio
import logging
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from mlx_server.engine.protocol import (
    Abort,
    Begun,
    Embed,
    Embedding,
    Fabric,
    Failed,
    FrameReader,
    Generate,
    Load,
    LoadFailed,
    LoadOptions,
    RankHost,
    Ready,
    Row,
    Stats,
    Stop,
    ToEngine,
    ToFront,
    Tokenizer,
    Tokens,
    decode_to_front,
    frame,
)
from mlx_server.engine.spawn import Child, next_line, spawn
from mlx_server.errors import LoadCrashed, ModelLoadFailed
from mlx_server.events import event

RECEIVE_BYTES = 1 << 18
KEPT_LOG_LINES = 50
STOP_SECONDS, METAL_STOP_SECONDS = 5.0, 30.0
"""For an engine to end when asked to; on Metal it lets go of wired memory first."""
EXIT_SECONDS = 1.0
"""For an engine to exit with its own code once its socket has closed."""
STACKS_SECONDS = 3.0
"""For an engine to tell its threads' stacks."""
LAST_FRAME = "_run_module_as_main"
"""Of its main thread, whose stack comes last."""

Spawn = Callable[[str, Sequence[socket.socket]], Awaitable[Child]]
"""A module, with sockets that it inherits."""

log = logging.getLogger("mlx_server.engine")


class Recipient(Protocol):
    """Receives what comes of one request."""

    def begin(self) -> None:
        """The engine starts on the request."""

    def put(self, item: Row | Failed) -> None:
        """The next row, or why there will be none."""


class Elsewhere(Protocol):
    """What is on other machines, and has been started there: ranks of an engine, or all of it.
    `hosts`: of all ranks, which talk over `fabric`; `sockets` lead to those elsewhere.
    """

    hosts: list[RankHost]
    fabric: Fabric | None
    sockets: Sequence[socket.socket]

    @property
    def lost_host(self) -> str | None:
        """A machine that is gone."""

    @property
    def killed(self) -> bool:
        """Whether a rank there was killed."""

    async def until_lost(self) -> None:
        """Until a machine is gone."""

    async def heard(self) -> None:
        """What the others tell tells all that they know of the engine's end."""

    def close_sockets(self) -> None:
        """Another process has them."""

    def release(self) -> None:
        """The engine has ended."""


class EngineClient:
    """When `closed` is set, recipients hear nothing more."""

    def __init__(self, model_id: str, child: Child, elsewhere: Elsewhere | None = None) -> None:
        self.model_id = model_id
        self.process = child.process
        self.pid = child.process.pid
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.last_lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
        self.closed = asyncio.Event()
        self.reads = 0
        self.host = elsewhere.hosts[0].name if elsewhere and elsewhere.hosts else ""
        """Its machine, if not this one."""
        self._child = child
        self._elsewhere = elsewhere
        self._stacks_told = asyncio.Event()
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._recipients: dict[int, Recipient] = {}
        assert child.process.stderr is not None
        self._log_relay = asyncio.create_task(self._relay_log(child.process.stderr))
        self._receiver = asyncio.create_task(self._receive(child.reader))
        self._watch = asyncio.create_task(self._end_when_lost()) if elsewhere else None

    @classmethod
    async def start(
        cls,
        model_id: str,
        path: Path,
        options: LoadOptions,
        adapter_path: Path | None = None,
        embedding: Embedding | None = None,
        elsewhere: Elsewhere | None = None,
        spawn: Spawn = spawn,
    ) -> Self:
        """Start an engine and wait until it has loaded the model folder `path`. The ranks
        `elsewhere` are released when it has ended.

        Raises ModelLoadFailed, or LoadCrashed when it ended without a reason. No process is left
        behind then, nor on cancellation.
        """
        client = cls(model_id, await _spawned(spawn, elsewhere), elsewhere)
        adapter = str(adapter_path) if adapter_path else None
        more = (elsewhere.hosts, elsewhere.fabric) if elsewhere else ()
        client._send(Load(str(path), options, adapter, embedding, *more))
        await client._until_loaded()
        return client

    @classmethod
    async def join(cls, model_id: str, child: Child, elsewhere: Elsewhere) -> Self:
        """An engine elsewhere, which has been told what to load. Waits and raises as `start`."""
        client = cls(model_id, child, elsewhere)
        await client._until_loaded()
        return client

    @property
    def in_flight(self) -> int:
        return len(self._recipients)

    def give_tokenizer(self, content: bytes) -> None:
        """As tokenizer.json, for grammars, instead of the folder's."""
        self._send(Tokenizer(content))

    def submit(self, request: Generate | Embed, recipient: Recipient) -> None:
        """An engine that has ended never answers."""
        self._recipients[request.id] = recipient
        self._send(request)

    def abort(self, ids: Iterable[int]) -> None:
        open_ids = [id_ for id_ in ids if self._recipients.pop(id_, None) is not None]
        if open_ids:
            self._send(Abort(open_ids))

    async def stop(self) -> None:
        """Kills an engine that does not end."""
        on_metal = self.ready is not None and self.ready.device == "metal"
        self._send(Stop())
        try:
            async with asyncio.timeout(METAL_STOP_SECONDS if on_metal else STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            log.warning(event("engine_stop_timeout", model=self.model_id, pid=self.pid))
        await self.kill()

    async def tell_stacks(self) -> None:
        """Have the engine log where its threads are, which it does even if it is stuck."""
        try:
            self.process.send_signal(signal.SIGUSR1)
        except ProcessLookupError:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(STACKS_SECONDS):
                await self._stacks_told.wait()

    async def kill(self) -> None:
        await self._child.kill()
        await asyncio.wait([self._receiver])
        self._log_relay.cancel()  # a process that the engine started may still hold its end
        ended = await asyncio.gather(self._receiver, self._log_relay, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                log.error(event("engine_protocol", model=self.model_id, error=repr(error)))

    @property
    def killed(self) -> bool:
        """Whether a process of it was, perhaps for want of memory."""
        elsewhere = self._elsewhere is not None and self._elsewhere.killed
        return elsewhere or self.process.returncode == -signal.SIGKILL

    @property
    def lost_host(self) -> str | None:
        """The machine of a rank, if it ended because that is gone."""
        return self._elsewhere.lost_host if self._elsewhere else None

    @property
    def how_it_ended(self) -> str:
        code = self.process.returncode
        if code is None:
            return "out of sight"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    async def _until_loaded(self) -> None:
        try:
            self.ready = await self._loaded
        except BaseException:
            await self.kill()
            raise
        self.pid = self.ready.pid

    def _send(self, message: ToEngine) -> None:
        data = frame(message)
        if not self._child.writer.is_closing():  # else the engine is gone
            self._child.writer.write(data)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        frames = FrameReader()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                self.reads += 1
                for body in frames.feed(data):
                    self._deliver(decode_to_front(body))
        except OSError as error:
            log.info(event("engine_connection_lost", model=self.model_id, error=error))
        finally:
            await self._end()

    def _deliver(self, message: ToFront) -> None:
        if isinstance(message, Ready | LoadFailed) and self._loaded.done():
            return  # the starter has given up
        match message:
            case Tokens(rows=rows):
                for row in rows:
                    self._forward(row.id, row, ended=row.finish is not None)
            case Begun(ids=ids):
                for id_ in ids:
                    if id_ in self._recipients:
                        self._recipients[id_].begin()
            case Failed(id=id_):
                self._forward(id_, message, ended=True)
            case Stats():
                self.stats = message
            case Ready():
                self._loaded.set_result(message)
            case LoadFailed(message=reason):
                self._loaded.set_exception(ModelLoadFailed(reason))

    def _forward(self, id_: int, item: Row | Failed, *, ended: bool) -> None:
        recipients = self._recipients
        recipient = recipients.pop(id_, None) if ended else recipients.get(id_)
        if recipient is not None:  # else it was aborted meanwhile
            recipient.put(item)

    async def _end_when_lost(self) -> None:
        assert self._elsewhere is not None
        await self._elsewhere.until_lost()
        log.error(event("host_lost", model=self.model_id, host=self.lost_host))
        self._child.kill_group()
        with suppress(ProcessLookupError):
            self.process.kill()

    async def _end(self) -> None:
        self.closed.set()
        if self._elsewhere is not None:
            self._elsewhere.release()
            await self._elsewhere.heard()
        if self._watch is not None:
            self._watch.cancel()
        try:
            async with asyncio.timeout(EXIT_SECONDS):
                await self.process.wait()
                await asyncio.wait([self._log_relay])
        except TimeoutError:
            await self._child.kill()
            if not self._log_relay.done():  # something that it has started is stopped, or busy
                self._child.kill_group()
        if not self._loaded.done():
            message = f"The engine of model `{self.model_id}` ended ({self.how_it_ended})."
            if self.lost_host is not None:
                message = f"host `{self.lost_host}` went away while the model was loading"
            self._loaded.set_exception(LoadCrashed(message, self.last_lines))
            # The starter may have been cancelled and never ask.
            self._loaded.exception()

    async def _relay_log(self, stderr: asyncio.StreamReader) -> None:
        while line := await next_line(stderr):
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            if text.endswith(LAST_FRAME):
                self._stacks_told.set()
            level, told = _level_of(text)
            log.log(level, event("engine_log", model=self.model_id, pid=self.pid, line=told))


async def _spawned(spawn: Spawn, elsewhere: Elsewhere | None) -> Child:
    try:
        return await spawn("mlx_server.engine.worker", elsewhere.sockets if elsewhere else ())
    except BaseException:
        if elsewhere is not None:
            elsewhere.release()
        raise
    finally:
        if elsewhere is not None:
            elsewhere.close_sockets()


def _level_of(line: str) -> tuple[int, str]:
    """What the engine logs begins with its level; what libraries print does not."""
    name, _, rest = line.partition(" ")
    level = logging.getLevelNamesMapping().get(name)
    return (logging.INFO, line) if level is None else (level, rest)
