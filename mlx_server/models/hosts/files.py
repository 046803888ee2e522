"""Whether two machines have the same model: digests of its files.

Reading all of a large model takes a while, so what was found is kept in the home, by path, size and
time of the last change.
"""

import hashlib
import logging
import os
import threading
from pathlib import Path

import msgspec

from mlx_server.engine.protocol import Load
from mlx_server.errors import reason
from mlx_server.events import event
from mlx_server.models.hosts.messages import Digests
from mlx_server.models.store.folder import INDEX, WEIGHTS
from mlx_server.models.store.lora import CONFIG
from mlx_server.models.store.lora import WEIGHTS as ADAPTER_WEIGHTS

NAMED = ("config.json", "tokenizer.json", INDEX)
CODE = "*.py"
MOST_KEPT = 4096
"""Files."""

log = logging.getLogger("mlx_server.hosts")


class Known(msgspec.Struct, frozen=True):
    """`changed`: nanoseconds since the epoch."""

    size: int
    changed: int
    digest: str


class ModelFiles:
    """Reads files, and keeps what it finds in `home`."""

    def __init__(self, home: Path) -> None:
        self._kept = home / "digests.json"
        self._lock = threading.Lock()

    def digests(self, folder: Path, adapter: Path | None = None) -> Digests:
        """Of all files that decide what an engine computes. Blocks. Raises OSError."""
        files = {file.name: file for file in _files(folder)}
        if adapter is not None:
            files |= {f"adapter/{name}": adapter / name for name in (CONFIG, ADAPTER_WEIGHTS)}
        with self._lock:
            known = self._read()
            found = {name: _digest(file, known) for name, file in files.items()}
            self._keep(known)
        return found

    def of_load(self, load: Load) -> Digests:
        return self.digests(Path(load.path), Path(load.adapter_path) if load.adapter_path else None)

    def _read(self) -> dict[str, Known]:
        try:
            return msgspec.json.decode(self._kept.read_bytes(), type=dict[str, Known])
        except (OSError, msgspec.MsgspecError):
            return {}

    def _keep(self, known: dict[str, Known]) -> None:
        """What another process has found meanwhile will be read once more."""
        for path in list(known)[:-MOST_KEPT]:
            del known[path]
        new = self._kept.with_suffix(f".{os.getpid()}")
        try:
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(msgspec.json.encode(known))
            new.replace(self._kept)
        except OSError as error:
            log.warning(event("digests_not_kept", reason=reason(error)))


def difference(ours: Digests, theirs: Digests) -> str | None:
    """Which of their files is not as ours, in words; None if all are."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            return f"it lacks {name}"
        if name not in ours:
            return f"it has a {name} more"
        if ours[name] != theirs[name]:
            return f"its {name} differs"
    return None


def _digest(file: Path, known: dict[str, Known]) -> str:
    path, facts = str(file.resolve()), file.stat()
    # Put back last: those that nobody asks for go first.
    had = known.pop(path, None)
    if had is None or (had.size, had.changed) != (facts.st_size, facts.st_mtime_ns):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        had = Known(facts.st_size, facts.st_mtime_ns, digest)
    known[path] = had
    return had.digest


def _files(folder: Path) -> list[Path]:
    named = [*(folder / name for name in NAMED), *folder.glob(WEIGHTS), *folder.glob(CODE)]
    return sorted({file for file in named if file.is_file()})
