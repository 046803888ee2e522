"""Downloads' progress, and the disk space check."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_server.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes; `total` is 0 while unknown."""

    stage: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes: of a download, and those of it that are not here yet."""

    total: int
    missing: int


OnProgress = Callable[[Progress], None]
"""Called from several threads, one at a time; raising ends the download."""


def check_space(folder: Path, needed: int) -> None:
    """Raises Unavailable for fewer than `needed` free bytes."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise Unavailable(
            f"{folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free",
            code="insufficient_storage",
        )
