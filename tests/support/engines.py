"""Engines for tests: real ones that are asked directly, and scripted ones within this process."""

import asyncio
import contextlib
import itertools
import signal
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mlx_server.engine.client import Elsewhere, EngineClient
from mlx_server.engine.protocol import (
    Abort,
    Begun,
    Embed,
    Embedding,
    FrameReader,
    Generate,
    Load,
    LoadFailed,
    LoadOptions,
    Memory,
    PrefixStats,
    Ready,
    Row,
    Stats,
    Stop,
    ToEngine,
    ToFront,
    Tokenizer,
    Tokens,
    decode_to_engine,
    frame,
)
from mlx_server.engine.spawn import Child
from mlx_server.errors import EngineFailed
from mlx_server.models.pool.stream import RowStream


class DirectEngine(EngineClient):
    """A real engine whose requests know nothing of its restarts and never pause."""

    _ids = itertools.count()
    up_to_date = False
    """Whether `stats` came after all rows that have come."""

    def generate(self, requests: Sequence[Generate | Embed]) -> RowStream:
        """Send `requests` at once, under new ids; returns the stream of their rows."""
        self.up_to_date = False
        numbers = [next(self._ids) for _ in requests]
        stream = RowStream(self, range(numbers[0], numbers[-1] + 1))
        for id_, request in zip(stream.ids, requests, strict=True):
            self.submit(msgspec.structs.replace(request, id=id_), stream)
        return stream

    def _deliver(self, message: ToFront) -> None:
        super()._deliver(message)
        self.up_to_date = isinstance(message, Stats)

    async def _end(self) -> None:
        await super()._end()
        told = f"the engine ended ({self.how_it_ended}): " + "; ".join(self.last_lines)
        for recipient in set(self._recipients.values()):
            if isinstance(recipient, RowStream):
                recipient.fail(EngineFailed(told))

    def pause(self, ids: Iterable[int]) -> None:
        pass

    def resume(self, ids: Iterable[int]) -> None:
        pass


class ScriptedProcess:
    """Looks like `asyncio.subprocess.Process` to those who start and end engines."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stderr = asyncio.StreamReader()
        self.ended = asyncio.Event()

    def send_signal(self, number: int) -> None:
        self.stderr.feed_data(b"in _run_module_as_main\n")

    def kill(self) -> None:
        self.exit(-signal.SIGKILL)

    def exit(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
            self.stderr.feed_eof()
            self.ended.set()

    async def wait(self) -> int:
        await self.ended.wait()
        assert self.returncode is not None
        return self.returncode


class ScriptedEngine:
    """The engine's side of a real socket: it speaks the protocol and computes nothing.

    The token at a position is the position, so that a generation that is resumed can be told from
    one that is started over.
    """

    def __init__(self, fleet: "Fleet", pid: int) -> None:
        self.process = ScriptedProcess(pid)
        self.load: Load | None = None
        self.tokenizer: bytes | None = None
        self.received: list[Generate | Embed] = []
        self.open: dict[int, Generate | Embed] = {}
        self._fleet = fleet
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    async def connect(self) -> Child:
        front, own = socket.socketpair()
        self._reader, self._writer = await asyncio.open_unix_connection(sock=own)
        reader, writer = await asyncio.open_unix_connection(sock=front)
        self._tasks = [
            asyncio.create_task(self._serve()),
            asyncio.create_task(self._close_when_ended()),
        ]
        return Child(self.process, reader, writer)

    def crash(self, code: int = -signal.SIGABRT, says: str = "") -> None:
        """End without a word but `says` on standard error."""
        self.process.stderr.feed_data(says.encode() + b"\n" if says else b"")
        self.process.exit(code)

    def send(self, message: msgspec.Struct) -> None:
        self._writer.write(frame(message))

    def begin(self, *ids: int) -> None:
        self.send(Begun(list(ids)))

    def step(self, id_: int, count: int = 1) -> None:
        """Generate so many tokens for the request, and its finish after the last."""
        request = self.open[id_]
        assert isinstance(request, Generate)
        done = len(request.prompt)
        rows = []
        for _ in range(count):
            tokens, done = [done], done + 1
            left = request.max_tokens - 1
            request = msgspec.structs.replace(
                request, prompt=request.prompt + tokens, max_tokens=left
            )
            rows.append(Row(id_, tokens, None if left else "length"))
        self.open[id_] = request
        if request.max_tokens == 0:
            del self.open[id_]
        for row in rows:
            self.send(Tokens([row]))

    async def _close_when_ended(self) -> None:
        await self.process.wait()
        self._writer.close()
        self._tasks[0].cancel()

    async def _serve(self) -> None:
        frames = FrameReader()
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(1 << 16):
                for body in frames.feed(data):
                    await self._handle(decode_to_engine(body))
        self.process.exit(0)

    async def _handle(self, message: ToEngine) -> None:
        match message:
            case Tokenizer(content=content):
                self.tokenizer = content
            case Load():
                self.load = message
                await self._load(message)
            case Generate() | Embed():
                self.received.append(message)
                self.open[message.id] = message
                self._fleet.asked(self, message)
            case Abort(ids=ids):
                for id_ in ids:
                    self.open.pop(id_, None)
            case Stop():
                self.process.exit(0)

    async def _load(self, load: Load) -> None:
        await self._fleet.may_load.wait()
        outcome = self._fleet.next_outcome(Path(load.path).name)
        if outcome == CRASH:
            self.crash(says="no way to load this")
        elif outcome is not None:
            self.send(LoadFailed(outcome))
            self.process.exit(1)
        else:
            self.send(self._fleet.ready(self, load))


CRASH = "crash"
"""A load's outcome: the engine ends without a word. Others are what it says of its failure."""


@dataclass
class Fleet:
    """Starts scripted engines, and says how they load and work."""

    engines: list[ScriptedEngine] = field(default_factory=list)
    outcomes: dict[str, deque[str | None]] = field(default_factory=dict)
    """What the next loads of a model folder come to; None is a success."""
    weights_bytes: int = 1000
    device: str = "cpu"
    poison: int | None = None
    """A token that ends any engine whose request holds it."""
    works: bool = True
    """Whether requests are computed at once, or as the test says."""
    may_load: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_load.set()

    async def spawn(self, module: str, sockets: Sequence[socket.socket] = ()) -> Child:
        engine = ScriptedEngine(self, 1_000_000 + len(self.engines))
        self.engines.append(engine)
        try:
            return await engine.connect()
        except BaseException:
            engine.process.kill()
            raise

    async def start(
        self,
        model_id: str,
        path: Path,
        options: LoadOptions,
        adapter_path: Path | None = None,
        embedding: Embedding | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> EngineClient:
        """Start an engine as `EngineClient.start` does."""
        return await EngineClient.start(
            model_id, path, options, adapter_path, embedding, elsewhere, spawn=self.spawn
        )

    @property
    def running(self) -> list[ScriptedEngine]:
        return [engine for engine in self.engines if engine.running]

    def of(self, pid: int | None) -> ScriptedEngine:
        [engine] = [engine for engine in self.engines if engine.process.pid == pid]
        return engine

    def next_outcome(self, folder: str) -> str | None:
        outcomes = self.outcomes.get(folder)
        return outcomes.popleft() if outcomes else None

    def asked(self, engine: ScriptedEngine, request: Generate | Embed) -> None:
        if not self.works:
            return
        engine.begin(request.id)
        if isinstance(request, Generate):
            if self.poison in request.prompt:
                engine.crash()
            else:
                engine.step(request.id, request.max_tokens)

    def ready(self, engine: ScriptedEngine, load: Load) -> Ready:
        assert load.options.kv_limit is not None
        return Ready(
            pid=engine.process.pid,
            device=self.device,
            model_type="scripted",
            context_length=2048,
            vocab_size=1 << 20,
            weights_bytes=self.weights_bytes,
            kv_limit=load.options.kv_limit,
            longest_sequence=2048,
            load_seconds=0.0,
            dequantized=False,
            blas=None,
            memory=msgspec.structs.replace(MEMORY, wired=self._wired(load)),
        )

    def _wired(self, load: Load) -> int:
        return self.weights_bytes if self.weights_bytes <= load.options.wired_limit else 0


MEMORY = Memory(active=1000, peak=1000, cache=0, limit=1 << 30)


def stats(longest_turn: float = 0.0) -> Stats:
    return Stats(
        running=0,
        prefilling=0,
        waiting=0,
        step_seconds=0.01,
        kv_bytes=0,
        preempted=0,
        prefix=PrefixStats(0, 0, 0, 0),
        memory=MEMORY,
        longest_turn=longest_turn,
    )


class NoTexts:
    """Text sides that hold nothing, in place of a `TextProcess`."""

    def __init__(self) -> None:
        self.open_texts = 0
        self.tokenizer: bytes | None = None

    async def open(self, path: Path, name: str, trust_remote_code: bool) -> "NoText":
        self.open_texts += 1
        return NoText(self)

    async def kill(self) -> None:
        pass


class NoText:
    def __init__(self, texts: NoTexts) -> None:
        self._texts = texts
        self.tokenizer = texts.tokenizer

    def close(self) -> None:
        self._texts.open_texts -= 1
