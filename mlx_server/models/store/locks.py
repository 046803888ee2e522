"""Inter-process locks on model folders; the system drops a dead process's."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_server.errors import BadRequest, ModelLoadFailed


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _write_lock_file(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def try_write_lock(folder: Path) -> Iterator[None]:
    """Raises BadRequest while `folder` is being written."""
    with _write_lock_file(folder).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(f"{folder.name} is being pulled.", param="model") from error
        yield


def _write_lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


class ModelLock:
    """Shared by servers that have the model loaded. Raises ModelLoadFailed during removal."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._file = _use_lock_file(home, folder).open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ModelLoadFailed("it is being removed") from error

    def release(self) -> None:
        self._file.close()


class RemovalLock:
    """Raises BadRequest while any server has the model loaded."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._file = _use_lock_file(home, folder).open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise BadRequest(
                "The model is loaded by a running server; unload it first.", param="model"
            ) from error

    def __enter__(self) -> "RemovalLock":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _use_lock_file(home: Path, folder: Path) -> Path:
    locks = home.expanduser() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
