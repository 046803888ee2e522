"""Rank 0 to another rank: what it says, in queues by what waits for it."""

import logging
import os
import queue
import socket
import threading

import msgspec

from mlx_server.engine.protocol import FrameReader, frame
from mlx_server.engine.ranks.messages import (
    Command,
    FromRank,
    Guesses,
    Problems,
    ToRank,
    decode_to_rank,
)

RECEIVE_BYTES = 1 << 16

log = logging.getLogger("mlx_server.engine")


class LeaderConnection:
    """A thread of its own reads. When rank 0 has ended, so does this process, at once."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._guesses: queue.SimpleQueue[Guesses] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[Problems] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="leader", daemon=True).start()

    def command(self, patience: float | None = None) -> Command | None:
        """The next one; None if none comes for `patience` seconds."""
        try:
            return self._commands.get(timeout=patience)
        except queue.Empty:
            return None

    def guesses(self) -> Guesses:
        return self._guesses.get()

    def problems(self) -> Problems:
        return self._problems.get()

    def tell(self, message: FromRank) -> None:
        self._connection.sendall(frame(message))

    def _read(self) -> None:
        frames = FrameReader()
        try:
            while data := self._receive():
                for body in frames.feed(data):
                    self._take(decode_to_rank(body))
        except msgspec.MsgspecError:
            log.exception("event=frame_unreadable")
            os._exit(1)
        os._exit(0)

    def _take(self, message: ToRank) -> None:
        match message:
            case Guesses():
                self._guesses.put(message)
            case Problems():
                self._problems.put(message)
            case _:
                self._commands.put(message)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(RECEIVE_BYTES)
        except OSError:
            return b""
