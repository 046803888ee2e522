"""Inter-process locks on model folders; the system drops a dead process's."""

import fcntl
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mlx_server.errors import BadRequest, ModelLoadFailed, Unavailable
from mlx_server.events import event

log = logging.getLogger("mlx_server.store")


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Raises OSError where nothing can be written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _write_lock_file(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def try_write_lock(folder: Path) -> Iterator[None]:
    """Raises BadRequest while `folder` is being written, Unavailable where it cannot be."""
    try:
        lock = _write_lock_file(folder).open("w")
    except OSError as error:
        raise Unavailable(f"{folder.parent} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadRequest(f"{folder.name} is being pulled.", param="model") from error
        yield


def _write_lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


class ModelLock:
    """Shared by servers that have the model loaded. Raises ModelLoadFailed during removal. Where
    the home cannot be written, or has no locks, the model is served without.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        self._file: IO[str] | None = None
        try:
            self._file = _use_lock_file(home, folder).open("w")
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ModelLoadFailed("it is being removed") from error
        except OSError as error:
            self.release()
            log.warning(event("model_not_locked", home=home, reason=error.strerror))

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


class RemovalLock:
    """Raises BadRequest while a server has the model loaded, Unavailable where nobody can tell."""

    def __init__(self, home: Path, folder: Path) -> None:
        try:
            self._file = _use_lock_file(home, folder).open("w")
        except OSError as error:
            raise Unavailable(
                f"Whether the model is in use cannot be told without writing to {home}: "
                f"{error.strerror}."
            ) from error
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
    locks = home / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
