"""Which blocks are on disk, when each was last used, and the limit on their files."""

import math
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_server.engine.cache.block_file import SUFFIX, TEMPORARY, remove_file

SCAN_SHARE = 16
"""The folder is scanned again after writing this part of its limit: other processes write too."""
SLACK_SHARE = 8
"""The part of the limit that is freed when the limit is reached."""
TOUCH_SECONDS = 600.0
"""Age from which a file's time of use is renewed."""
STALE_SECONDS = 600.0
"""Age from which a temporary file is taken for that of a killed process."""
# Nothing else is ever removed, whatever folder a user names.
BLOCK_NAME = re.compile(r"([0-9a-f]{2}){4,}\.safetensors")
FOLDER_NAME = re.compile(r"[0-9a-f]{8,}")


@dataclass(slots=True)
class _Entry:
    size: int
    used: float


@dataclass(frozen=True, slots=True, order=True)
class _File:
    used: int  # mtime in nanoseconds
    size: int
    path: Path


class DiskIndex:
    """The blocks in `root/identity`, and the `limit` in bytes on all models' files in `root`.

    Processes may share `root`; each enforces the limit. One thread adds and removes; others look
    up, renew and forget, which needs no lock: each is one dict operation.
    """

    def __init__(self, root: Path, identity: str, limit: int) -> None:
        self.root = root
        self.identity = identity
        self.folder = root / identity
        self.limit = limit
        self.nbytes = 0
        """Of all models' files, as last scanned plus what was added since."""
        self.unscanned: float = math.inf
        """Bytes added since the last scan."""
        self._entries: dict[bytes, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def path(self, key: bytes) -> Path:
        return self.folder / (key.hex() + SUFFIX)

    def leading(self, keys: Sequence[bytes], nbytes: int) -> list[bytes]:
        """`keys` up to the first that is missing or exceeds `nbytes`; one always fits."""
        found: list[bytes] = []
        total = 0
        for key in keys:
            entry = self._entries.get(key)
            total += entry.size if entry else 0
            if entry is None or (found and total > nbytes):
                break
            found.append(key)
        return found

    def untouched(self, keys: Sequence[bytes]) -> list[bytes]:
        due = time.time() - TOUCH_SECONDS
        return [key for key in keys if (entry := self._entries.get(key)) and entry.used < due]

    def renew(self, key: bytes, now: int, position: int) -> None:
        """Mark a prompt's block as used at `now`, in unix nanoseconds."""
        used = now - 1000 * position  # what comes later in a prompt is removed earlier
        # Another process may have removed the file; a read-only folder keeps its times.
        with suppress(OSError):
            os.utime(self.path(key), ns=(used, used))
        if entry := self._entries.get(key):
            entry.used = used / 1e9

    def add(self, key: bytes, size: int) -> None:
        self._entries[key] = _Entry(size, time.time())
        self.nbytes += size
        self.unscanned += size

    def forget(self, key: bytes) -> None:
        self._entries.pop(key, None)

    def make_folder(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def make_room(self, nbytes: int) -> bool:
        """Remove the least recently used files; whether `nbytes` fit."""
        if not self._fits(nbytes) or self.unscanned > self.limit // SCAN_SHARE:
            self._scan(nbytes)
        return self._fits(nbytes)

    def _fits(self, nbytes: int) -> bool:
        return self.nbytes + nbytes <= self.limit

    def _scan(self, room: int) -> None:
        files = sorted(_block_files(self.root))
        total = sum(file.size for file in files)
        gone = 0
        if total + room > self.limit:
            goal = self.limit - self.limit // SLACK_SHARE - room
            while total > goal and gone < len(files):
                total -= files[gone].size if remove_file(files[gone].path) else 0
                gone += 1
        own = [file for file in files[gone:] if file.path.parent == self.folder]
        self._entries = {
            bytes.fromhex(file.path.stem): _Entry(file.size, file.used / 1e9) for file in own
        }
        self.nbytes = total
        self.unscanned = 0


def _block_files(root: Path) -> Iterator[_File]:
    for folder in _list_folder(root):
        if not FOLDER_NAME.fullmatch(folder.name):
            continue
        for entry in _list_folder(folder.path):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # removed by another process since
            if entry.name.startswith(TEMPORARY):
                if status.st_mtime < time.time() - STALE_SECONDS:
                    remove_file(Path(entry.path))
            elif BLOCK_NAME.fullmatch(entry.name) and stat.S_ISREG(status.st_mode):
                yield _File(status.st_mtime_ns, status.st_size, Path(entry.path))


def _list_folder(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
