"""glibc's heap, from which MLX's CPU device takes its buffers."""

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST_INT = 2**31 - 1


def keep_freed(most: int) -> bool:
    """Have the heap reuse freed memory, of which it keeps up to `most` bytes at its end; returns
    whether there is such a heap.

    A page given back costs 2 to 10 us when touched again. MLX's own cache of freed buffers is of
    no use for arrays that grow or lose rows: it gives a buffer to one of nearly the same size only,
    where the heap cuts and joins.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl's, for one
        return False
    trimmed = libc.mallopt(M_TRIM_THRESHOLD, min(most, LARGEST_INT))
    # By default large buffers are no part of the heap, and are given back at once.
    joined = libc.mallopt(M_MMAP_MAX, 0)
    return bool(trimmed and joined)


def trimmer() -> Callable[[int], int] | None:
    """`malloc_trim`, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
