"""The disk behind the prefix cache: computed blocks go there and come back when wanted."""

import itertools
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many

from mlx_server.engine.cache.blocks import Block
from mlx_server.engine.cache.disk import BlockRead, DiskCache

PUMP_BYTES = 32 << 20
"""What is handed to the disk in a turn, at most."""


class DiskTier:
    """Without a disk it keeps and finds nothing."""

    def __init__(self, disk: DiskCache | None) -> None:
        self._disk = disk
        self._computing: list[Block] = []
        self._unwritten: deque[Block] = deque()

    def leading(self, keys: Many[bytes]) -> list[bytes]:
        """`keys` up to the first that is not on disk."""
        return list(itertools.takewhile(self._disk.holds, keys)) if self._disk else []

    def read(self, keys: Many[bytes]) -> BlockRead:
        assert self._disk is not None
        return self._disk.read(keys)

    def add(self, blocks: Iterable[Block]) -> None:
        """Queue blocks that need not be evaluated yet."""
        if self._disk is not None:
            self._computing += blocks

    def touch(self, blocks: Iterable[Block]) -> None:
        if self._disk is not None:
            self._disk.touch([block.key for block in blocks])

    def pump(self) -> None:
        """Once a turn: hand over what was added before the last call, computed by now.

        Bounded, since a discrete device has to copy it first.
        """
        self._write(PUMP_BYTES)
        self._unwritten.extend(self._computing)
        self._computing = []

    def settle(self) -> None:
        self._unwritten.extend(self._computing)
        self._computing = []
        self._write(sum(block.nbytes for block in self._unwritten))

    def clear(self) -> None:
        self._computing.clear()
        self._unwritten.clear()

    def close(self) -> None:
        self.settle()
        if self._disk is not None:
            self._disk.close()

    def _write(self, nbytes: int) -> None:
        while self._disk is not None and self._unwritten and nbytes > 0:
            block = self._unwritten.popleft()
            self._disk.write(block.key, [*block.arrays, *(block.snapshot or ())])
            nbytes -= block.nbytes
