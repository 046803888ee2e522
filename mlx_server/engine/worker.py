"""The engine process: `python -m mlx_server.engine.worker FD [FD …]`, the first an open socket to
the front, the others to the model's ranks on other machines.

One thread owns every array and runs the loop; another reads the socket, so that an abort or the
end of the front is noticed while the device works.
"""

import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from mlx_server.engine.faults import DeviceGone
from mlx_server.engine.idle import Chore, IdleTime
from mlx_server.engine.loading import blas_threads, is_models_fault, load
from mlx_server.engine.protocol import (
    Abort,
    Begun,
    Embed,
    Failed,
    FrameReader,
    Generate,
    Load,
    LoadFailed,
    Stats,
    Stop,
    ToEngine,
    ToFront,
    Tokenizer,
    Tokens,
    decode_to_engine,
    frame,
)
from mlx_server.engine.schedule.pace import Pace
from mlx_server.engine.spawn import leave_group

if TYPE_CHECKING:
    from mlx_server.engine.cpu.threads import BlasThreads
    from mlx_server.engine.ranks.followers import Followers

STATS_INTERVAL = 1.0
"""Seconds between statistics while the engine works."""
RECEIVE_BYTES = 1 << 16
LONGEST_BURST = 64
"""Messages that an idle engine takes before it begins to work."""
DEVICE_GONE_CODE = 70
"""With which an engine ends whose device computes nothing any more."""

log = logging.getLogger("mlx_server.engine")


class Inbox:
    """Messages from the front, read by a thread of its own.

    When the front is gone, that calls `before_end` and ends the process.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.before_end: Callable[[], None] = lambda: None
        self._connection = connection
        self._messages: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def wait(self) -> ToEngine:
        return self._messages.get()

    def burst(self, quiet: float, patience: float | None = None) -> Iterator[ToEngine]:
        """The next message, and those that follow within `quiet` seconds of each other.

        None if the first takes longer than `patience` seconds.
        """
        timeout = patience
        for _ in range(LONGEST_BURST):
            try:
                yield self._messages.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = quiet

    def arrived(self) -> Iterator[ToEngine]:
        while not self._messages.empty():
            yield self._messages.get_nowait()

    def _read(self) -> None:
        frames = FrameReader()
        try:
            while data := self._receive():
                for body in frames.feed(data):
                    self._messages.put(decode_to_engine(body))
        except msgspec.MsgspecError:
            # Which requests are lost cannot be known; another engine is sent all of them.
            log.exception("event=frame_unreadable")
            os._exit(1)
        # The front is gone and nobody is left to compute for. A device in mid-step must not delay
        # this, so the process ends here and now.
        self.before_end()
        os._exit(0)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(RECEIVE_BYTES)
        except OSError:
            return b""


class Work(Protocol):
    """Has an engine's requests and computes them: a `Scheduler`, or an `Embedder`."""

    pace: Pace

    @property
    def busy(self) -> bool: ...

    def add(self, request: Any) -> Failed | None:
        """Queue a request of the kind that the model takes; says why when it can never run."""

    def abort(self, ids: Sequence[int]) -> None: ...

    def take_tokenizer(self, content: bytes) -> None: ...

    def turn(self) -> Iterator[Tokens | Begun | Failed]:
        """Compute for a bounded time; yields what comes of it."""

    def recover(self, error: Exception) -> list[Failed]:
        """Go on after a turn that raised `error`; returns the requests that are given up.

        Raises DeviceGone.
        """

    def release(self) -> None:
        """After each turn: let go of what has no use before the next."""

    def chores(self) -> Sequence[Chore]: ...

    def stats(self) -> Stats: ...

    def close(self) -> None: ...


class Engine:
    """`blas`: its threads, where MLX computes on a CPU."""

    def __init__(
        self, connection: socket.socket, inbox: Inbox, work: Work, blas: "BlasThreads | None"
    ) -> None:
        self.connection = connection
        self.inbox = inbox
        self.work = work
        self.idle = IdleTime(work.chores())
        self._stats_due = 0.0
        self._blas = blas

    def run(self) -> None:
        while True:
            for message in self._messages():
                if isinstance(message, Stop):
                    self.work.close()
                    return
                self._take(message)
            self._share_processors()
            if self.work.busy:
                self._turn()
                self.work.release()
                self.idle.begin()
            else:
                self.idle.spend()
            self._report()

    def _messages(self) -> Iterator[ToEngine]:
        if self.work.busy:
            return self.inbox.arrived()
        # Requests that come together are best prefilled together.
        return self.inbox.burst(self.work.pace.burst_seconds(), self.idle.left())

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Generate | Embed):
            refusal = self.work.add(message)
            if refusal:
                self._send(refusal)
        elif isinstance(message, Abort):
            self.work.abort(message.ids)
        elif isinstance(message, Tokenizer):
            self.work.take_tokenizer(message.content)

    def _share_processors(self) -> None:
        if self._blas is None:
            return
        if self.work.busy:
            self._blas.share()
        else:
            self._blas.rest()

    def _turn(self) -> None:
        try:
            for message in self.work.turn():
                if not isinstance(message, Tokens) or message.rows:
                    self._send(message)
        except (RuntimeError, ValueError, MemoryError) as error:
            # MLX raises these for a failed allocation or operation.
            log.exception("event=step_failed")
            for failure in self.work.recover(error):
                self._send(failure)

    def _report(self) -> None:
        now = time.monotonic()
        if now >= self._stats_due or not self.work.busy:
            self._stats_due = now + STATS_INTERVAL
            self._send(self.work.stats())

    def _send(self, message: ToFront) -> None:
        self.connection.sendall(frame(message))


def start_followers(
    connection: socket.socket, inbox: Inbox, load: Load, elsewhere: Sequence[socket.socket]
) -> "Followers | None":
    """The other ranks of a model that is divided; `elsewhere`: to those on other machines."""
    if load.options.ranks == 1 or load.embedding is not None:
        return None
    from mlx_server.engine.ranks.followers import Followers  # seldom needed

    def failed(reason: str) -> None:
        connection.sendall(frame(LoadFailed(reason)))

    followers = Followers(load, failed, elsewhere)
    inbox.before_end = followers.kill
    return followers


def main() -> None:
    """Entry of the engine process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    leave_group()
    # The front asks before it ends an engine that hangs.
    faulthandler.register(signal.SIGUSR1)
    connection, *elsewhere = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    inbox = Inbox(connection)
    message = inbox.wait()
    if not isinstance(message, Load):
        raise SystemExit(f"expected a load message first, got {type(message).__name__}")
    followers = start_followers(connection, inbox, message, elsewhere)
    try:
        work, ready = load(message, followers)
    except Exception as error:
        # Whatever is wrong with a model folder, the front must hear of it.
        log.exception("event=load_failed path=%s", message.path)
        if followers is not None and not is_models_fault(error):
            followers.hear_out()
        connection.sendall(frame(LoadFailed(str(error) or type(error).__name__)))
        raise SystemExit(1) from error
    engine = Engine(connection, inbox, work, blas_threads())
    connection.sendall(frame(ready))
    try:
        engine.run()
    except DeviceGone as gone:
        log.critical("event=device_gone reason=%r", str(gone))
        if followers is not None:
            followers.hear_out()
        # Without ado: what tidies up on the way out would wait for the device.
        os._exit(DEVICE_GONE_CODE)


if __name__ == "__main__":
    main()
