"""The processes of a model's other ranks, to rank 0, which starts them and ends when one ends.

They are in its process group, so that whoever ends the group ends them too.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from mlx_server.engine.protocol import FrameReader, Load, Memory, RankStats, frame
from mlx_server.engine.ranks.messages import (
    Begin,
    Failing,
    FromRank,
    Loaded,
    Prepared,
    Stop,
    ToRank,
    Using,
    decode_from_rank,
)
from mlx_server.engine.spawn import socket_pair

RECEIVE_BYTES = 1 << 16
STOP_SECONDS = 3.0
"""For the others to end when asked to."""
EXIT_SECONDS = 1.0
"""For a process to be over once its socket has closed."""
REASON_SECONDS = 2.0
"""For another rank's end to be noticed, of which this one's failure may have come."""
GONE_CODE = 71
"""With which rank 0 ends after another has ended."""

Answer = TypeVar("Answer", Prepared, Loaded)

log = logging.getLogger("mlx_server.engine")


class Follower:
    """Another rank. `memory` is what it last said it uses."""

    def __init__(self, rank: int, load: Load) -> None:
        self.rank = rank
        self.memory: Memory | None = None
        self.answers: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self._connection, its = socket_pair()
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlx_server.engine.follower", str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self.tell(frame(Begin(rank, load)))

    def tell(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, as the thread that reads will see
            self._connection.sendall(data)

    def messages(self) -> Iterator[FromRank]:
        """Until it ends."""
        frames = FrameReader()
        while data := self._receive():
            for body in frames.feed(data):
                yield decode_from_rank(body)

    def how_it_ended(self) -> int:
        """Its exit code, once its socket has closed; a negative number is a signal."""
        try:
            return self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return GONE_CODE

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(RECEIVE_BYTES)
        except OSError:
            return b""


class Followers:
    """`failed` is told, in a thread, what a rank says of a model that it cannot load."""

    def __init__(self, load: Load, failed: Callable[[str], None]) -> None:
        self._failed = failed
        self._stopping = False
        self._ending = threading.Lock()
        self._all = [Follower(rank, load) for rank in range(1, load.options.ranks)]
        self._readers = [
            threading.Thread(target=self._read, args=(one,), name=f"rank {one.rank}", daemon=True)
            for one in self._all
        ]
        for reader in self._readers:
            reader.start()

    def ready(self) -> None:
        """Waits until all are ready to join the ring."""
        self._await(Prepared)

    def loaded(self) -> list[Loaded]:
        """Waits until all have loaded."""
        return self._await(Loaded)

    def tell(self, message: ToRank) -> None:
        data = frame(message)
        for one in self._all:
            one.tell(data)

    def stats(self) -> list[RankStats]:
        return [RankStats(one.rank, one.process.pid, one.memory) for one in self._all]

    def hear_out(self) -> None:
        """This process has failed. If that is because another has, this does not return."""
        deadline = time.monotonic() + REASON_SECONDS
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Returns once all have ended."""
        self._stopping = True
        self.tell(Stop())
        deadline = time.monotonic() + STOP_SECONDS
        for one in self._all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for one in self._all:
            one.process.kill()

    def _await(self, kind: type[Answer]) -> list[Answer]:
        answers = [one.answers.get() for one in self._all]
        assert all(isinstance(one, kind) for one in answers), answers
        return [one for one in answers if isinstance(one, kind)]

    def _read(self, one: Follower) -> None:
        try:
            for message in one.messages():
                self._take(one, message)
        except msgspec.MsgspecError:
            log.exception("event=frame_unreadable rank=%d", one.rank)
        if not self._stopping:
            self._end_as(one)

    def _take(self, one: Follower, message: FromRank) -> None:
        match message:
            case Using(memory=memory):
                one.memory = memory
            case Failing(message=reason):
                with self._ending:  # nobody else's end is told
                    self._failed(reason)
                    self.kill()
                    os._exit(1)
            case _:
                one.answers.put(message)

    def _end_as(self, one: Follower) -> None:
        """End this process, so that all of them are started again."""
        code = one.how_it_ended()
        with self._ending:
            log.critical("event=rank_ended rank=%d pid=%d code=%d", one.rank, one.process.pid, code)
            self.kill()
            if code == -signal.SIGKILL:
                # By which the front knows that memory may have run out.
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(GONE_CODE)
