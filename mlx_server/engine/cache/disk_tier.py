"""The disk behind the prefix cache: which blocks go there, and when.

Disks wear out, and most blocks are never asked for again. So a block is written when memory has no
more room for it, and while the engine is idle: soon if it has been of use, later if not.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many

from mlx_server.engine.cache.blocks import Block
from mlx_server.engine.cache.disk import BlockRead, DiskCache, nothing_read
from mlx_server.engine.protocol import DiskStats

PUMP_BYTES = 32 << 20
"""What is handed to the disk in a turn, at most."""
RESCUE_BYTES = 256 << 20
"""Blocks without a place in memory that may wait for the disk, at most."""
SAVE_PAUSE = 0.1
"""Seconds of idle time between two portions."""


class DiskTier:
    """Without a disk it keeps and finds nothing."""

    def __init__(self, disk: DiskCache | None) -> None:
        self._disk = disk
        self._dropped: list[Block] = []
        self._rescued: deque[Block] = deque()
        self._rescued_bytes = 0

    def leading(self, keys: Many[bytes]) -> list[bytes]:
        """`keys` up to the first that is not on disk."""
        return list(itertools.takewhile(self._disk.holds, keys)) if self._disk else []

    def read(self, keys: Many[bytes]) -> BlockRead:
        return self._disk.read(keys) if self._disk else nothing_read()

    def touch(self, blocks: Iterable[Block]) -> None:
        if self._disk is not None:
            self._disk.touch([block.key for block in blocks])

    def rescue(self, blocks: Iterable[Block]) -> None:
        """Queue blocks that memory has no room for. They need not be evaluated yet."""
        if self._disk is not None:
            self._dropped += self._disk.missing(blocks)

    def pump(self) -> None:
        """Once a turn: hand over what was rescued before the last call, computed by now.

        Bounded, since a discrete device has to copy it first.
        """
        self._hand_over(PUMP_BYTES)
        self._take_dropped()
        while self._rescued_bytes > RESCUE_BYTES:
            self._next_rescued()

    def save(self, blocks: Iterable[Block]) -> float | None:
        """Hand a portion of evaluated `blocks` over; seconds until the next, None after the last.

        The disk may refuse all of them: it is full, or has been written enough today.
        """
        if self._disk is None:
            return None
        self._take_dropped()
        self._hand_over(PUMP_BYTES)
        budget = PUMP_BYTES
        for block in self._disk.missing(blocks):
            if budget <= 0 or not self._disk.has_room(block.nbytes):
                return SAVE_PAUSE if self._disk.willing else None
            self._write(block)
            budget -= block.nbytes
        return None

    def figures(self) -> DiskStats | None:
        return self._disk.figures() if self._disk else None

    def clear(self) -> None:
        self._dropped.clear()
        self._rescued.clear()
        self._rescued_bytes = 0

    def close(self, blocks: Iterable[Block]) -> None:
        """Write what was rescued, then `blocks`, as far as the time for that goes."""
        if self._disk is not None:
            self._take_dropped()
            self._disk.close(itertools.chain(self._rescued, blocks))

    def _take_dropped(self) -> None:
        self._rescued.extend(self._dropped)
        self._rescued_bytes += sum(block.nbytes for block in self._dropped)
        self._dropped = []

    def _hand_over(self, budget: int) -> None:
        while self._disk is not None and self._rescued and budget > 0:
            if self._disk.willing and not self._disk.has_room(self._rescued[0].nbytes):
                return
            block = self._next_rescued()
            self._write(block)
            budget -= block.nbytes

    def _next_rescued(self) -> Block:
        block = self._rescued.popleft()
        self._rescued_bytes -= block.nbytes
        return block

    def _write(self, block: Block) -> None:
        assert self._disk is not None
        self._disk.write(block.key, block.content)
