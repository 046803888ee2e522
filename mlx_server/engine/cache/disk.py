"""KV-cache blocks on disk, so that prefixes outlive the engine that computed them.

The main thread calls `DiskCache` and owns all arrays; the two threads see bytes only.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_server.engine.cache.block_file import (
    LARGEST_BLOCK,
    Damaged,
    HostArray,
    read_block,
    remove_file,
    to_device,
    to_host,
    write_block,
)
from mlx_server.engine.cache.blocks import Block
from mlx_server.engine.cache.daily import DailyWrites
from mlx_server.engine.cache.disk_index import DiskIndex
from mlx_server.engine.protocol import DiskStats

QUEUE_LIMIT = LARGEST_BLOCK
"""Bytes that may wait to be written."""
READ_LIMIT = 32 << 20
"""Bytes of one `BlockRead`: it is held in memory, and copied to the device between two steps."""
WRITE_RATE = 256 << 20
"""Bytes a second at most. Hashing and writing go several times faster; held to this, a burst of
blocks takes a fraction of one core and of the disk, yet keeps up with a prefill."""
RETRY_SECONDS = 60.0
"""Pause after the disk refused a file."""
CLOSE_SECONDS = 2.0
"""Time that `close` gives to the blocks still waiting."""

log = logging.getLogger("mlx_server.engine")


@dataclass(frozen=True, slots=True)
class _Write:
    key: bytes
    arrays: list[HostArray]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Touch:
    keys: list[bytes]


class BlockRead:
    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = list(keys)
        self.begun = time.time_ns()
        self.found: list[list[HostArray]] = []
        self.cancelled = False
        self.finished = threading.Event()

    @property
    def done(self) -> bool:
        return self.finished.is_set()

    def wait(self, timeout: float) -> bool:
        return self.finished.wait(timeout)

    def cancel(self) -> None:
        self.cancelled = True

    def blocks(self, count: int | None = None) -> list[list[mx.array]]:
        """Up to the first that could not be read, and up to `count`. For the main thread."""
        return [[to_device(array) for array in arrays] for arrays in self.found[:count]]


def nothing_read() -> BlockRead:
    read = BlockRead([])
    read.finished.set()
    return read


class DiskCache:
    """The blocks of one model in `root/identity`; `limit` in bytes is on all files in `root`,
    `daily` on what is written there in a day (None: nothing is).

    `identity` is hexadecimal. No method but `close` waits for the disk.
    """

    def __init__(self, root: Path, identity: str, limit: int, daily: int | None = None) -> None:
        self.index = DiskIndex(root, identity, limit)
        self.writer = DiskWriter(self.index, DailyWrites(root, daily))
        self._reader = _DiskReader(self.index)
        self._closed = False
        self.writer.start()
        self._reader.start()

    @property
    def willing(self) -> bool:
        """False while the disk refuses files, and once the day's limit is reached."""
        return not self._closed and self.writer.willing

    def holds(self, key: bytes) -> bool:
        """False until the folder is scanned."""
        return key in self.index

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Those of `blocks` that are neither there nor on their way."""
        known = (self.index, self.writer.waiting)
        return (block for block in blocks if not any(block.key in place for place in known))

    def has_room(self, nbytes: int) -> bool:
        """Whether a block of that size may be queued."""
        return self.writer.has_room(nbytes)

    def write(self, key: bytes, arrays: Sequence[mx.array]) -> None:
        """Queue a block, or drop it if too much waits.

        The arrays must be evaluated: MLX would make the caller wait otherwise. They are not copied.
        """
        if not self._closed:
            self.writer.put(key, arrays)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark blocks found in memory as used; `keys` in the prompt's order.

        Otherwise a prompt's beginning, never read from disk, would go before what needs it.
        """
        self.writer.touch(keys)

    def read(self, keys: Sequence[bytes]) -> BlockRead:
        """Begin to read `keys`, up to a missing one or `READ_LIMIT` bytes."""
        found = [] if self._closed else self.index.leading(keys, READ_LIMIT)
        if not found:
            return nothing_read()
        read = BlockRead(found)
        self._reader.put(read)
        return read

    def figures(self) -> DiskStats:
        return DiskStats(
            blocks=len(self.index),
            written_bytes=self.writer.written_bytes,
            read_bytes=self._reader.read_bytes,
            refused_blocks=self.writer.refused_blocks,
        )

    def close(self, blocks: Iterable[Block] = ()) -> None:
        """Write what waits and `blocks`, as far as `CLOSE_SECONDS` go."""
        if self._closed:
            return
        self._closed = True
        give_up_at = time.monotonic() + CLOSE_SECONDS
        self.writer.hurry(give_up_at)
        for block in self.missing(blocks):
            if not self.writer.await_room(block.nbytes):
                break
            self.writer.put(block.key, block.content)
        self.writer.stop()
        self._reader.stop()
        for thread in (self.writer, self._reader):
            thread.join(max(0.0, give_up_at - time.monotonic()))


class DiskWriter(threading.Thread):
    def __init__(self, index: DiskIndex, daily: DailyWrites) -> None:
        super().__init__(name="disk-writer", daemon=True)
        self.waiting: set[bytes] = set()
        self.written_bytes = 0
        self.refused_blocks = 0
        """Which the disk, its limit or the day's had no room for."""
        self._index = index
        self._daily = daily
        self._waiting_bytes = 0
        self._written = threading.Condition()
        self._work: queue.SimpleQueue[_Write | _Touch | None] = queue.SimpleQueue()
        self._failing = False
        self._retry_at = 0.0
        self._hurry = threading.Event()
        self._give_up_at = math.inf

    @property
    def willing(self) -> bool:
        return time.monotonic() >= self._retry_at

    def has_room(self, nbytes: int) -> bool:
        return self._waiting_bytes + nbytes <= QUEUE_LIMIT

    def await_room(self, nbytes: int) -> bool:
        """Whether there is room before `hurry`'s time is over."""
        with self._written:
            left = self._give_up_at - time.monotonic()
            return self._written.wait_for(lambda: self.has_room(nbytes), max(0.0, left))

    def put(self, key: bytes, arrays: Sequence[mx.array]) -> None:
        if key in self._index or key in self.waiting:
            return
        nbytes = sum(array.nbytes for array in arrays)
        if not self.has_room(nbytes) or not self.willing:
            self.refused_blocks += 1
            return
        block = _Write(key, [to_host(array) for array in arrays], nbytes)
        with self._written:
            self.waiting.add(key)
            self._waiting_bytes += nbytes
        self._work.put(block)

    def touch(self, keys: Sequence[bytes]) -> None:
        if old := self._index.untouched(keys):
            self._work.put(_Touch(old))

    def hurry(self, give_up_at: float) -> None:
        """Write without pauses from now on, and nothing after `give_up_at` (monotonic)."""
        self._give_up_at = give_up_at
        self._hurry.set()

    def stop(self) -> None:
        """End after what waits."""
        self._work.put(None)

    def run(self) -> None:
        self._index.make_room(0)
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        # A method of its own, so that no finished block stays referenced.
        work = self._work.get()
        if work is None:
            return False
        if isinstance(work, _Touch):
            now = time.time_ns()
            for position, key in enumerate(work.keys):
                self._index.renew(key, now, position)
            return True
        try:
            size = self._write(work)
        except Exception:
            # Whatever is wrong here, serving goes on.
            log.exception("event=disk_cache_failed")
            size = 0
        with self._written:
            self.waiting.remove(work.key)
            self._waiting_bytes -= work.nbytes
            self._written.notify_all()
        self._hurry.wait(size / WRITE_RATE)
        return True

    def _write(self, block: _Write) -> int:
        now = time.monotonic()
        if now > self._give_up_at or now < self._retry_at:
            self.refused_blocks += 1
            return 0
        if not self._daily.allows(block.nbytes):
            self._pause("enough has been written today")
            return 0
        if not self._index.make_room(block.nbytes):
            self._pause("the limit leaves no room")
            return 0
        try:
            self._index.make_folder()
            path = self._index.path(block.key)
            size = write_block(path, self._index.identity, block.key, block.arrays)
            self._daily.add(size)
        except OSError as error:
            self._pause(_reason(error))
            return 0
        if self._failing:
            self._failing = False
            log.info("event=disk_cache_writable folder=%s", self._index.folder)
        self._index.add(block.key, size)
        self.written_bytes += size
        return size

    def _pause(self, reason: str) -> None:
        self.refused_blocks += 1
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._failing:
            self._failing = True
            folder = self._index.folder
            log.warning('event=disk_cache_unwritable folder=%s reason="%s"', folder, reason)


class _DiskReader(threading.Thread):
    def __init__(self, index: DiskIndex) -> None:
        super().__init__(name="disk-reader", daemon=True)
        self._index = index
        self.read_bytes = 0
        self._reads: queue.SimpleQueue[BlockRead | None] = queue.SimpleQueue()
        self._closing = False

    def put(self, read: BlockRead) -> None:
        self._reads.put(read)

    def stop(self) -> None:
        self._closing = True
        self._reads.put(None)

    def run(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        # A method of its own, so that no finished read stays referenced.
        read = self._reads.get()
        if read is None:
            return False
        try:
            self._read(read)
        except Exception:
            # A block that cannot be read is computed; a read that never ends would hang a request.
            log.exception("event=disk_cache_failed")
        finally:
            read.finished.set()
        return True

    def _read(self, read: BlockRead) -> None:
        for position, key in enumerate(read.keys):
            if read.cancelled or self._closing:
                return
            try:
                arrays = read_block(self._index.path(key), self._index.identity, key)
            except FileNotFoundError:
                self._index.forget(key)
                return
            except (Damaged, OSError) as error:
                self._condemn(key, error)
                return
            self._index.renew(key, read.begun, position)
            self.read_bytes += sum(array.data.nbytes for array in arrays)
            read.found.append(arrays)

    def _condemn(self, key: bytes, error: Damaged | OSError) -> None:
        """Forget a file; remove it only if it was read: another may be whole."""
        path = self._index.path(key)
        log.warning('event=disk_cache_damaged file=%s reason="%s"', path, _reason(error))
        self._index.forget(key)
        if isinstance(error, Damaged):
            remove_file(path)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
