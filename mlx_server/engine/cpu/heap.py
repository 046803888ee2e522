"""glibc's heap, from which MLX's CPU device takes its buffers."""

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_REUSED = 32 << 20
"""The most that glibc takes for these."""


def keep_freed() -> None:
    """Reuse freed memory: a page given back costs 3 us when touched again."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_REUSED)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)


def trimmer() -> Callable[[int], int] | None:
    """`malloc_trim`, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
