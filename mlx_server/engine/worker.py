"""The engine process: `python -m mlx_server.engine.worker FD`, FD an open socket to the front.

One thread owns every array and runs the loop; another reads the socket, so that an abort or the
end of the front is noticed while the device works.
"""

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_server.engine.cpu.blas import ADVICE, load_openblas
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
    Stats,
    Stop,
    ToEngine,
    ToFront,
    Tokens,
    decode_to_engine,
    frame,
)
from mlx_server.engine.run.patches import leave_out_text_side
from mlx_server.engine.schedule.pace import Pace
from mlx_server.engine.spawn import step_back
from mlx_server.units import parse_bytes

if TYPE_CHECKING:
    from mlx_server.engine.cache.prefix import PrefixCache
    from mlx_server.engine.embedding.embedder import Embedder
    from mlx_server.engine.memory import DeviceMemory
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.schedule.scheduler import Scheduler

STATS_INTERVAL = 1.0
"""Seconds between statistics while the engine works."""
RECEIVE_BYTES = 1 << 16
LONGEST_BURST = 64
"""Messages that an idle engine takes before it begins to work."""

log = logging.getLogger("mlx_server.engine")


class Inbox:
    """Messages from the front, read by a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def wait(self) -> ToEngine:
        """The next message, however long it takes."""
        return self._messages.get()

    def burst(self, quiet: float) -> Iterator[ToEngine]:
        """The next message, and those that follow within `quiet` seconds of each other."""
        yield self.wait()
        for _ in range(LONGEST_BURST):
            try:
                yield self._messages.get(timeout=quiet)
            except queue.Empty:
                return

    def arrived(self) -> Iterator[ToEngine]:
        """What has come in meanwhile, without waiting."""
        while not self._messages.empty():
            yield self._messages.get_nowait()

    def _read(self) -> None:
        frames = FrameReader()
        while data := self._receive():
            for body in frames.feed(data):
                self._messages.put(decode_to_engine(body))
        # The front is gone and nobody is left to compute for. A device in mid-step must not delay
        # this, so the process ends here and now.
        os._exit(0)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(RECEIVE_BYTES)
        except OSError:
            return b""


class Work(Protocol):
    """What has an engine's requests and decides what is computed next: a `Scheduler`, or for
    embedding models an `Embedder`."""

    pace: Pace

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""

    def add(self, request: Any) -> Failed | None:
        """Queue a request of the kind that the model takes; says why when it can never run."""

    def abort(self, ids: Sequence[int]) -> None:
        """Forget these requests."""

    def turn(self) -> Iterator[Tokens | Begun | Failed]:
        """Compute for a bounded time; yields what comes of it."""

    def recover(self, error: Exception) -> list[Failed]:
        """Go on after a turn that raised `error`; returns the requests that are given up."""

    def release(self) -> None:
        """Give memory back that is not needed now."""

    def stats(self) -> Stats:
        """The present figures."""

    def close(self) -> None:
        """Finish what must not be lost."""


class Engine:
    """The loop over one loaded model."""

    def __init__(self, connection: socket.socket, inbox: Inbox, scheduler: Work) -> None:
        self.connection = connection
        self.inbox = inbox
        self.scheduler = scheduler
        self._stats_due = 0.0

    def run(self) -> None:
        """Serve until told to stop."""
        while True:
            for message in self._messages():
                if isinstance(message, Stop):
                    self.scheduler.close()
                    return
                self._take(message)
            if self.scheduler.busy:
                self._turn()
            self.scheduler.release()
            self._report()

    def _messages(self) -> Iterator[ToEngine]:
        if self.scheduler.busy:
            return self.inbox.arrived()
        # Requests that come together are best prefilled together.
        return self.inbox.burst(self.scheduler.pace.burst_seconds())

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Generate | Embed):
            refusal = self.scheduler.add(message)
            if refusal:
                self._send(refusal)
        elif isinstance(message, Abort):
            self.scheduler.abort(message.ids)

    def _turn(self) -> None:
        try:
            for message in self.scheduler.turn():
                if not isinstance(message, Tokens) or message.rows:
                    self._send(message)
        except (RuntimeError, ValueError, MemoryError) as error:
            # MLX raises these for a failed allocation or operation.
            log.exception("event=step_failed")
            for failure in self.scheduler.recover(error):
                self._send(failure)

    def _report(self) -> None:
        """Send statistics when they are due, and always on falling idle."""
        now = time.monotonic()
        if now >= self._stats_due or not self.scheduler.busy:
            self._stats_due = now + STATS_INTERVAL
            self._send(self.scheduler.stats())

    def _send(self, message: ToFront) -> None:
        self.connection.sendall(frame(message))


def load(message: Load) -> tuple[Work, Ready]:
    """Load the model that `message` names.

    Raises ModelError when the folder does not hold a model that can run.
    """
    started = time.perf_counter()
    options = message.options
    blas = load_openblas(options.openblas)
    if not options.trust_remote_code:  # a model's own code may well read text
        leave_out_text_side()
    # Only now: a BLAS loaded after MLX would never be used.
    from mlx_server.engine.memory import DeviceMemory, device_name

    memory = DeviceMemory(options.memory_limit, options.cache_limit)
    device = device_name()
    if device == "cpu" and sys.platform.startswith("linux"):
        log.info("event=blas library=%s%s", blas, "" if blas else f' advice="{ADVICE}"')
    scheduler: Scheduler | Embedder
    width = 0
    if message.embedding is None:
        scheduler = _scheduler(message, memory)
    else:
        scheduler = _embedder(message, message.embedding, memory)
        width = scheduler.model.width
    scheduler.warm_up()
    backend = scheduler.model
    ready = Ready(
        pid=os.getpid(),
        device=device,
        model_type=backend.model_type,
        context_length=backend.context_length,
        vocab_size=backend.vocab_size,
        weights_bytes=backend.weights_bytes,
        kv_limit=scheduler.kv_limit,
        longest_sequence=scheduler.longest_sequence,
        load_seconds=time.perf_counter() - started,
        dequantized=backend.dequantized,
        blas=blas,
        memory=memory.read(),
        width=width,
    )
    return scheduler, ready


def _scheduler(message: Load, memory: "DeviceMemory") -> "Scheduler":
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.schedule.scheduler import Scheduler

    options = message.options
    adapter = Path(message.adapter_path) if message.adapter_path else None
    backend = Backend(Path(message.path), options, memory, adapter)
    kv_limit = _kv_limit(options, memory, backend)
    return Scheduler(
        backend,
        memory,
        _prefix_cache(message, backend, kv_limit),
        max_batch=options.max_batch,
        kv_limit=kv_limit,
        prefill_chunk=options.prefill_chunk,
        kv_share=options.kv_share,
    )


def _embedder(message: Load, embedding: Embedding, memory: "DeviceMemory") -> "Embedder":
    from mlx_server.engine.embedding.backend import EmbeddingBackend
    from mlx_server.engine.embedding.embedder import Embedder
    from mlx_server.engine.run.backend import ModelError

    if message.adapter_path is not None:
        raise ModelError("LoRA adapters are not applied to embedding models")
    backend = EmbeddingBackend(Path(message.path), message.options, memory, embedding)
    return Embedder(backend, memory)


def _prefix_cache(message: Load, backend: "Backend", kv_limit: int) -> "PrefixCache":
    from mlx_server.engine.cache.disk import DiskCache
    from mlx_server.engine.cache.identity import model_identity
    from mlx_server.engine.cache.prefix import PrefixCache

    options = message.options
    limit = parse_bytes(options.prefix_cache, kv_limit)
    if backend.layout.obstacle is not None:
        log.info("event=prefix_cache_off reason=%s", backend.layout.obstacle)
        limit = 0
    disk = None
    if limit > 0 and options.disk_cache_folder is not None:
        identity = model_identity(message, backend.layout.describe())
        disk = DiskCache(Path(options.disk_cache_folder), identity, options.disk_cache_limit)
    return PrefixCache(backend.layout, limit, disk)


def _kv_limit(options: LoadOptions, memory: "DeviceMemory", backend: "Backend") -> int:
    """Bytes that KV caches may take. Raises ModelError when that leaves room for no request."""
    left = memory.limit - backend.weights_bytes
    limit = left if options.kv_limit is None else min(options.kv_limit, left)
    if backend.kv_cost.longest(limit, backend.context_length) == 0:
        from mlx_server.engine.run.backend import ModelError

        raise ModelError(
            f"its weights take {backend.weights_bytes:,} of the {memory.limit:,} bytes that it may "
            "use, which leaves too little for a KV cache"
        )
    return limit


def main() -> None:
    """Entry of the engine process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    step_back()
    connection = socket.socket(fileno=int(sys.argv[1]))
    inbox = Inbox(connection)
    message = inbox.wait()
    if not isinstance(message, Load):
        raise SystemExit(f"expected a load message first, got {type(message).__name__}")
    try:
        scheduler, ready = load(message)
    except Exception as error:
        # Whatever is wrong with a model folder, the front must hear of it.
        log.exception("event=load_failed path=%s", message.path)
        connection.sendall(frame(LoadFailed(str(error) or type(error).__name__)))
        raise SystemExit(1) from error
    connection.sendall(frame(ready))
    Engine(connection, inbox, scheduler).run()


if __name__ == "__main__":
    main()
