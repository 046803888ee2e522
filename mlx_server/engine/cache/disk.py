"""KV-cache blocks on disk, so that a prompt's beginning outlives the engine that computed it.

One safetensors file holds one block. `DiskCache` is called by the engine's main thread, which owns
all arrays; its threads see bytes only. Which blocks to keep is `prefix_cache`'s business.
"""

import hashlib
import json
import logging
import math
import os
import queue
import re
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

FORMAT = "1"
"""Version of the files' content; those of another version are damaged to us."""
QUEUE_LIMIT = 256 << 20
"""Bytes that may wait to be written, so that no block is larger either."""
LARGEST_FILE = QUEUE_LIMIT + (1 << 20)
READ_LIMIT = 32 << 20
"""Bytes of one `BlockRead`: it holds them in memory, and `blocks` copies them between two steps."""
WRITE_RATE = 256 << 20
"""Bytes a second to write at most. Hashing and writing go several times faster; held to this, a
burst of blocks takes a fraction of one core and of the disk, yet keeps up with a prefill."""
SCAN_SHARE = 16
"""The folder is looked at anew after writing this part of its limit: others write there too."""
SLACK_SHARE = 8
"""The part of the limit that is made free when the limit is reached."""
RETRY_SECONDS = 60.0
"""Pause after the disk refused a file."""
TOUCH_SECONDS = 600.0
"""A file's time of use is not renewed before it is this old."""
STALE_SECONDS = 600.0
"""Age at which a temporary file is taken for that of a killed process."""
CLOSE_SECONDS = 2.0
"""Time that `close` gives to the blocks still waiting."""
TEMPORARY = ".writing-"
SUFFIX = ".safetensors"
# Nothing else is ever removed, whatever folder a user names.
BLOCK_NAME = re.compile(r"([0-9a-f]{2}){4,}\.safetensors")
FOLDER_NAME = re.compile(r"[0-9a-f]{8,}")

DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
    "C64": mx.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ON_HOST = {"BOOL": "?", "BF16": "u2"}
"""What numpy calls these types, when not as safetensors does. It has no bfloat16."""

log = logging.getLogger("mlx_server.engine")


class Damaged(Exception):
    """A file is not what was written for its block."""


@dataclass(frozen=True, slots=True)
class HostArray:
    """An array's bytes in row-major order; `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(slots=True)
class DiskStats:
    """Counts since the start. `nbytes` is what all files take on disk, as last seen."""

    written_blocks: int = 0
    written_bytes: int = 0
    read_blocks: int = 0
    read_bytes: int = 0
    damaged: int = 0
    dropped: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class _Entry:
    """A file of this cache: its size in bytes and the time (unix seconds) of its last use."""

    size: int
    used: float


@dataclass(frozen=True, slots=True, order=True)
class _File:
    """A block's file of any model; `used` is its mtime in nanoseconds."""

    used: int
    size: int
    path: Path


@dataclass(frozen=True, slots=True)
class _Write:
    key: bytes
    arrays: list[HostArray]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Touch:
    keys: list[bytes]


class BlockRead:
    """Blocks on their way from disk. `keys` may be fewer than were asked for, see `read`."""

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
        """Wait until done, for `timeout` seconds at most; returns whether it is."""
        return self.finished.wait(timeout)

    def cancel(self) -> None:
        """Read no further; what is read already is still given."""
        self.cancelled = True

    def blocks(self) -> list[list[mx.array]]:
        """The blocks of `keys` up to the first that could not be read. For the main thread."""
        return [[to_device(array) for array in arrays] for arrays in self.found]


class DiskCache:
    """The blocks of one model in `root/identity`, and the limit on all files under `root`.

    `identity` is a hexadecimal name for the model and its cache's layout. `limit` is in bytes;
    several engines may share `root`, and each of them enforces it. One thread writes, removes and
    keeps the index; another reads. No method but `flush` and `close` waits for the disk.
    """

    def __init__(self, root: Path, identity: str, limit: int) -> None:
        self.root = root
        self.folder = root / identity
        self.identity = identity
        self.limit = limit
        self._stats = DiskStats()
        self._index: dict[bytes, _Entry] = {}
        self._waiting: set[bytes] = set()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._work: queue.SimpleQueue[_Write | _Touch | None] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[BlockRead | None] = queue.SimpleQueue()
        self._scanned = False
        self._written_since_scan = 0
        self._failing = False
        self._retry_at = 0.0
        self._closing = threading.Event()
        self._give_up_at = math.inf
        self._threads = [
            threading.Thread(target=self._write_all, name="disk-writer", daemon=True),
            threading.Thread(target=self._read_all, name="disk-reader", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> DiskStats:
        with self._changed:
            return replace(self._stats)

    def holds(self, key: bytes) -> bool:
        """Whether the block is on disk, as far as known; False until the folder is scanned."""
        return key in self._index

    def write(self, key: bytes, arrays: Sequence[mx.array]) -> None:
        """Have a block written some time, unless too much waits already.

        The arrays must be evaluated: MLX cannot be asked whether they are, and would make the
        caller wait. They are not copied, and stay in memory until written.
        """
        if key in self._index or key in self._waiting:
            return
        nbytes = sum(array.nbytes for array in arrays)
        if not self._admits(nbytes):
            with self._changed:
                self._stats.dropped += 1
            return
        block = _Write(key, [to_host(array) for array in arrays], nbytes)
        with self._changed:
            self._waiting.add(key)
            self._waiting_bytes += nbytes
        self._work.put(block)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark blocks as used though they were not read, since they are in memory.

        `keys` in the order of the prompt. Without this a prompt's beginning, always found in
        memory, would be removed from disk before the blocks that are of no use without it.
        """
        due = time.time() - TOUCH_SECONDS
        old = [key for key in keys if (entry := self._index.get(key)) and entry.used < due]
        if old:
            self._work.put(_Touch(old))

    def read(self, keys: Sequence[bytes]) -> BlockRead:
        """Begin to read these blocks, up to the first that is not held or to `READ_LIMIT` bytes.

        What is left can be read once these blocks have been taken.
        """
        read = BlockRead([] if self._closing.is_set() else self._portion(keys))
        if read.keys:
            self._wanted.put(read)
        else:
            read.finished.set()
        return read

    def flush(self, timeout: float) -> bool:
        """Wait until the folder is scanned and nothing waits to be written."""
        with self._changed:
            return self._changed.wait_for(lambda: self._scanned and not self._waiting, timeout)

    def close(self) -> None:
        """Write what waits as far as `CLOSE_SECONDS` allow, and end the threads."""
        if self._closing.is_set():
            return
        self._give_up_at = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        self._work.put(None)
        self._wanted.put(None)
        for thread in self._threads:
            thread.join(max(0.0, self._give_up_at - time.monotonic()))

    def _admits(self, nbytes: int) -> bool:
        full = self._waiting_bytes + nbytes > QUEUE_LIMIT
        return not (full or self._closing.is_set() or time.monotonic() < self._retry_at)

    def _portion(self, keys: Sequence[bytes]) -> list[bytes]:
        portion: list[bytes] = []
        nbytes = 0
        for key in keys:
            entry = self._index.get(key)
            nbytes += entry.size if entry else 0
            if entry is None or (portion and nbytes > READ_LIMIT):
                break
            portion.append(key)
        return portion

    def _path(self, key: bytes) -> Path:
        return self.folder / (key.hex() + SUFFIX)

    # the writer thread

    def _write_all(self) -> None:
        self._scan(room=0)
        with self._changed:
            self._scanned = True
            self._changed.notify_all()
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """Do the next piece of work. A method of its own, so that nothing done stays referenced."""
        work = self._work.get()
        if work is None:
            return False
        if isinstance(work, _Touch):
            now = time.time_ns()
            for number, key in enumerate(work.keys):
                self._renew(key, _time_of_use(now, number))
            return True
        try:
            size = self._store(work)
        except Exception:
            # Whatever is wrong here, serving goes on.
            log.exception("event=disk_cache_failed")
            size = 0
        with self._changed:
            self._waiting.remove(work.key)
            self._waiting_bytes -= work.nbytes
            self._stats.dropped += not size
            self._changed.notify_all()
        self._closing.wait(size / WRITE_RATE)
        return True

    def _store(self, block: _Write) -> int:
        """Write a block; returns its file's size, 0 if there is none."""
        now = time.monotonic()
        if now > self._give_up_at or now < self._retry_at:
            return 0
        if not self._make_room(block.nbytes):
            self._refused("the limit leaves no room")
            return 0
        try:
            size = self._write_file(block)
        except OSError as error:
            self._refused(_reason(error))
            return 0
        if self._failing:
            self._failing = False
            log.info("event=disk_cache_writable folder=%s", self.folder)
        self._written_since_scan += size
        with self._changed:
            self._index[block.key] = _Entry(size, time.time())
            self._stats.written_blocks += 1
            self._stats.written_bytes += size
            self._stats.nbytes += size
        return size

    def _write_file(self, block: _Write) -> int:
        """The file appears whole or not at all; after a power cut its checksum may be wrong."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # mkstemp makes files that only their owner may read.
        descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=self.folder)
        try:
            with open(descriptor, "wb") as file:
                size = sum(map(file.write, pack(self.identity, block.key, block.arrays)))
            os.replace(temporary, self._path(block.key))
        except OSError:
            _remove(Path(temporary))
            raise
        return size

    def _refused(self, reason: str) -> None:
        """The disk is full, say, or the folder not to be written: stop for a while."""
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._failing:
            self._failing = True
            log.warning('event=disk_cache_unwritable folder=%s reason="%s"', self.folder, reason)

    def _make_room(self, nbytes: int) -> bool:
        """Remove what was used least recently, if need be; returns whether `nbytes` fit."""
        fits = self._stats.nbytes + nbytes <= self.limit
        if not fits or self._written_since_scan > self.limit // SCAN_SHARE:
            self._scan(nbytes)
        return self._stats.nbytes + nbytes <= self.limit

    def _scan(self, room: int) -> None:
        """Look at all files under the root, and make `room` bytes where the limit is exceeded."""
        files = sorted(_block_files(self.root))
        total = sum(file.size for file in files)
        gone = 0
        if total + room > self.limit:
            goal = self.limit - self.limit // SLACK_SHARE - room
            while total > goal and gone < len(files):
                total -= files[gone].size if _remove(files[gone].path) else 0
                gone += 1
        own = [file for file in files[gone:] if file.path.parent == self.folder]
        self._index = {
            bytes.fromhex(file.path.stem): _Entry(file.size, file.used / 1e9) for file in own
        }
        self._written_since_scan = 0
        with self._changed:
            self._stats.nbytes = total

    def _renew(self, key: bytes, used: int) -> None:
        """Set the time of a file's last use, in nanoseconds."""
        # Another process may have removed the file; a folder not ours to write keeps its times.
        with suppress(OSError):
            os.utime(self._path(key), ns=(used, used))
        if entry := self._index.get(key):
            entry.used = used / 1e9

    # the reader thread

    def _read_all(self) -> None:
        while self._read_next():
            pass

    def _read_next(self) -> bool:
        read = self._wanted.get()
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
        for number, key in enumerate(read.keys):
            if read.cancelled or self._closing.is_set():
                return
            arrays = self._load(key)
            if arrays is None:
                return
            self._renew(key, _time_of_use(read.begun, number))
            read.found.append(arrays)

    def _load(self, key: bytes) -> list[HostArray] | None:
        try:
            data = _read_file(self._path(key))
            arrays = unpack(self.identity, key, data)
        except FileNotFoundError:
            self._index.pop(key, None)
            return None
        except (Damaged, OSError) as error:
            self._condemn(key, error)
            return None
        with self._changed:
            self._stats.read_blocks += 1
            self._stats.read_bytes += data.nbytes
        return arrays

    def _condemn(self, key: bytes, error: Damaged | OSError) -> None:
        """Forget a file, and remove it if it was read: one that cannot be may be whole."""
        path = self._path(key)
        log.warning('event=disk_cache_damaged file=%s reason="%s"', path, _reason(error))
        self._index.pop(key, None)
        with self._changed:
            self._stats.damaged += 1
        if isinstance(error, Damaged):
            _remove(path)


# a block's file

HEADER = struct.Struct("<Q")
START = b'{"__metadata__":{"sha256":"'
DIGEST = slice(HEADER.size + len(START), HEADER.size + len(START) + 64)
"""Where the checksum stands, in hexadecimal. It covers every byte but itself and `START`."""


def pack(identity: str, key: bytes, arrays: Sequence[HostArray]) -> list[bytes | memoryview]:
    """The parts of a block's file, in order.

    The safetensors package reads such files. It is not used to write or read them, since it copies
    the data while it holds Python's lock, and cannot cover its header by a checksum.
    """
    header: dict[str, object] = {"__metadata__": {"sha256": "", **_metadata(identity, key)}}
    end = 0
    for number, array in enumerate(arrays):
        begin, end = end, end + array.data.nbytes
        offsets = [begin, end]
        header[str(number)] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": offsets}
    rest = json.dumps(header, separators=(",", ":")).encode()[len(START) :]
    rest += b" " * (-(DIGEST.stop + len(rest)) % 8)
    size = HEADER.pack(DIGEST.stop - HEADER.size + len(rest))
    data = [array.data for array in arrays]
    return [size, START, _checksum([size, rest, *data]), rest, *data]


def unpack(identity: str, key: bytes, file: memoryview) -> list[HostArray]:
    """The arrays in a block's file. Raises Damaged unless it is what `pack` made for the block."""
    if file[HEADER.size : DIGEST.start] != START:
        raise Damaged("no header")
    if file[DIGEST] != _checksum([file[: HEADER.size], file[DIGEST.stop :]]):
        raise Damaged("wrong checksum")
    # The file is as it was written, but maybe for another block or by another version.
    (size,) = HEADER.unpack_from(file)
    data = file[HEADER.size + size :]
    try:
        header = json.loads(bytes(file[HEADER.size : HEADER.size + size]))
        metadata = header.pop("__metadata__")
        del metadata["sha256"]
        if metadata != _metadata(identity, key):
            raise Damaged("another block's")
        return [_host_array(tensor, data) for tensor in header.values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"unknown content: {type(error).__name__}") from error


def _metadata(identity: str, key: bytes) -> dict[str, str]:
    return {"format": FORMAT, "identity": identity, "key": key.hex()}


def _host_array(tensor: dict[str, Any], data: memoryview) -> HostArray:
    begin, end = tensor["data_offsets"]
    array = HostArray(tensor["dtype"], tuple(tensor["shape"]), data[begin:end])
    if math.prod(array.shape) * DTYPES[array.dtype].size != array.data.nbytes:
        raise ValueError("its shape does not fit its data")
    return array


def _checksum(parts: Iterable[bytes | memoryview]) -> bytes:
    """SHA-256 in hexadecimal. Of hashlib's it is the fastest where processors have it built in."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def to_host(array: mx.array) -> HostArray:
    """The bytes of an evaluated array: a view if they lie in order, else a copy."""
    buffer: Any = array
    view = memoryview(buffer)
    # As plain bytes a buffer can be had whatever its type, with no operation of MLX.
    data = np.frombuffer(view if view.c_contiguous else view.tobytes(), dtype=np.uint8)
    return HostArray(NAMES[array.dtype], tuple(array.shape), data.data)


def to_device(array: HostArray) -> mx.array:
    """A copy as an array of MLX's own. A bfloat16 one is evaluated with what uses it."""
    dtype = DTYPES[array.dtype]
    name = ON_HOST.get(array.dtype) or f"{array.dtype[0].lower()}{dtype.size}"
    numbers = np.frombuffer(array.data, dtype=name).reshape(array.shape)
    numbers = np.require(numbers, requirements=["ALIGNED"])
    if dtype == mx.bfloat16:
        return mx.array(numbers).view(dtype)
    return mx.array(numbers, dtype=dtype)


# the file system


def _read_file(path: Path) -> memoryview:
    """All bytes of a block's file. Raises OSError, or Damaged if it cannot be one."""
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
            raise Damaged("no block's file")
        data = np.empty(status.st_size, dtype=np.uint8).data
        rest = data
        while rest:
            count = file.readinto(rest)
            if not count:
                raise Damaged("cut short")
            rest = rest[count:]
    return data


def _open_at_once(path: str, flags: int) -> int:
    # Another process's pipe of this name would else hold the thread for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _time_of_use(now: int, number: int) -> int:
    """The time for block `number` of a prompt: what comes later in it is removed earlier."""
    return now - 1000 * number


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _block_files(root: Path) -> Iterator[_File]:
    """The files of all models' blocks. Removes temporary ones of processes that were killed."""
    for folder in _entries(root):
        if not FOLDER_NAME.fullmatch(folder.name):
            continue
        for entry in _entries(folder.path):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # removed by another process since
            if entry.name.startswith(TEMPORARY):
                if status.st_mtime < time.time() - STALE_SECONDS:
                    _remove(Path(entry.path))
            elif BLOCK_NAME.fullmatch(entry.name) and stat.S_ISREG(status.st_mode):
                yield _File(status.st_mtime_ns, status.st_size, Path(entry.path))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder: nothing if there is none, or none that may be looked into."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: Path) -> bool:
    """Remove a file; returns whether it is gone. Another process may have been faster."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
