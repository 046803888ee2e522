"""What a container leaves of the machine's memory: the limits of Linux's control groups."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

VERSION_2 = ["memory.max", "memory.high"]
VERSION_1 = ["memory.limit_in_bytes"]


def memory_limit(root: Path = Path("/")) -> int | None:
    """The least limit, in bytes, of this process's groups and those around them; None if none."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    return min((limit for line in lines for limit in _limits(root, line)), default=None)


def _limits(root: Path, line: str) -> Iterator[int]:
    """Of a line of /proc/self/cgroup: hierarchy, controllers, path."""
    _, controllers, path = line.split(":", 2)
    if not controllers:
        folder, files = root / "sys/fs/cgroup", VERSION_2
    elif "memory" in controllers.split(","):
        folder, files = root / "sys/fs/cgroup/memory", VERSION_1
    else:
        return
    # A container may see its own group as the root, under a path of the machine's.
    group = PurePosixPath(path.lstrip("/"))
    for parent in (group, *group.parents):
        for file in files:
            limit = _read(folder / parent / file)
            if limit is not None:
                yield limit


def _read(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # else "max"
