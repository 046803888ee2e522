"""Marks on disk that a model folder is in use, seen by every process of this user's."""

import fcntl
import hashlib
from pathlib import Path

from mlx_server.errors import BadRequest, ModelLoadFailed


class ModelLock:
    """Held while a model is loaded; several servers may hold one for the same folder.

    The system drops it with the process, however that ends. Raises ModelLoadFailed while the
    folder is being removed.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        self._file = _lock_file(home, folder).open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ModelLoadFailed("it is being removed") from error

    def release(self) -> None:
        """Let go; may be called twice."""
        self._file.close()


class RemovalLock:
    """Held while a model folder is removed. Raises BadRequest while anybody has it loaded."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._file = _lock_file(home, folder).open("w")
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


def _lock_file(home: Path, folder: Path) -> Path:
    locks = home.expanduser() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
