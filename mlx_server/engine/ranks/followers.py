"""A model's other ranks to rank 0, which ends when one of them ends.

Those on this machine it starts itself, in its process group, so that whoever ends the group ends
them too. Those on other machines have been started for it; it has a connection to each.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from mlx_server.engine.protocol import FrameReader, Load, LoadOptions, Memory, RankStats, frame
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
VISIBLE = "CUDA_VISIBLE_DEVICES"
GONE_CODE = 71
"""With which rank 0 ends after another has ended."""

Answer = TypeVar("Answer", Prepared, Loaded)

log = logging.getLogger("mlx_server.engine")


class Follower:
    """Another rank. `memory` is what it last said it uses; `host` its machine, if not this one."""

    def __init__(
        self,
        rank: int,
        connection: socket.socket,
        process: "subprocess.Popen[bytes] | None" = None,
        host: str = "",
    ) -> None:
        self.rank = rank
        self.host = host
        self.pid = process.pid if process else 0
        self.memory: Memory | None = None
        self.answers: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self._connection = connection
        self._process = process

    @classmethod
    def here(cls, rank: int, gpu: str | None = None) -> "Follower":
        """`gpu` is the only one that it sees."""
        own, its = socket_pair()
        environment = None if gpu is None else os.environ | {VISIBLE: gpu}
        with its:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlx_server.engine.follower", str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        return cls(rank, own, process)

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
        """Its exit code, once its socket has closed; a negative number is a signal. That of a
        process elsewhere is not known here.
        """
        if self._process is None:
            return GONE_CODE
        try:
            return self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return GONE_CODE

    def wait(self, seconds: float) -> None:
        """For its end, if it is a process of this machine."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def kill(self) -> None:
        """Elsewhere it ends with its connection."""
        if self._process is not None:
            self._process.kill()
        else:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(RECEIVE_BYTES)
        except OSError:
            return b""


class Followers:
    """`failed` is told, in a thread, what a rank says of a model that it cannot load. `connections`
    are to the ranks on other machines.
    """

    def __init__(
        self,
        load: Load,
        failed: Callable[[str], None],
        connections: Sequence[socket.socket] = (),
    ) -> None:
        self._failed = failed
        self._stopping = False
        self._ending = threading.Lock()
        if load.hosts:
            places = zip(load.hosts[1:], connections, strict=True)
            self._all = [
                Follower(rank, connection, host=host.name)
                for rank, (host, connection) in enumerate(places, 1)
            ]
        else:
            gpus = gpus_of_ranks(load.options)
            self._all = [Follower.here(rank, gpus[rank]) for rank in range(1, load.options.ranks)]
        for one in self._all:
            one.tell(frame(Begin(one.rank, load)))
        self._readers = [
            threading.Thread(target=self._read, args=(one,), name=f"rank {one.rank}", daemon=True)
            for one in self._all
        ]
        for reader in self._readers:
            reader.start()

    def ready(self) -> list[Prepared]:
        """Waits until all are ready to join the ring."""
        prepared = self._await(Prepared)
        for one, told in zip(self._all, prepared, strict=True):
            one.pid = told.pid
        return prepared

    def loaded(self) -> list[Loaded]:
        """Waits until all have loaded."""
        return self._await(Loaded)

    def tell(self, message: ToRank) -> None:
        data = frame(message)
        for one in self._all:
            one.tell(data)

    def stats(self) -> list[RankStats]:
        return [RankStats(one.rank, one.pid, one.memory, one.host) for one in self._all]

    def hear_out(self) -> None:
        """This process has failed. If that is because another has, this does not return."""
        self._join_readers(REASON_SECONDS)

    def stop(self) -> None:
        """Let them end."""
        self._stopping = True
        self.tell(Stop())

    def close(self) -> None:
        """Returns once all have ended."""
        deadline = time.monotonic() + STOP_SECONDS
        self._join_readers(STOP_SECONDS)
        for one in self._all:
            one.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for one in self._all:
            one.kill()

    def _join_readers(self, seconds: float) -> None:
        """A reader ends when its rank has ended."""
        deadline = time.monotonic() + seconds
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))

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
                    self._failed(f"host `{one.host}`: {reason}" if one.host else reason)
                    self.kill()
                    os._exit(1)
            case _:
                one.answers.put(message)

    def _end_as(self, one: Follower) -> None:
        """End this process, so that all of them are started again."""
        code = one.how_it_ended()
        with self._ending:
            log.critical(
                "event=rank_ended rank=%d host=%s pid=%d code=%d",
                *(one.rank, one.host or "here", one.pid, code),
            )
            self.kill()
            if code == -signal.SIGKILL:
                # By which the front knows that memory may have run out.
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(GONE_CODE)


def gpus_of_ranks(options: LoadOptions) -> list[str | None]:
    """By rank the GPU of this machine that it has, None if that is not told: that of rank 0, and of
    all of them unless they talk over NCCL. No name means that there are too few.
    """
    if options.ranks_over != "nccl":
        return [None] * options.ranks
    visible = os.environ.get(VISIBLE)
    names = visible.split(",") if visible else [str(i) for i in range(options.ranks)]
    return [None, *names[1 : options.ranks], *[""] * (options.ranks - max(1, len(names)))]
