"""Device memory: read, limit, release. Engine side only."""

import ctypes
import sys
from collections.abc import Callable

import mlx.core as mx
import psutil

from mlx_server.engine.protocol import Memory
from mlx_server.units import parse_bytes

MEMORY_WORDS = ("unable to allocate", "attempting to allocate", "out of memory", "insufficient")
"""What the messages of MLX's allocators say, on a CPU, on Metal and on CUDA."""


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: where MLX computes by default."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_memory() -> int:
    """Bytes that the default device has, as MLX or the system reports them."""
    total = int(psutil.virtual_memory().total)
    if device_name() == "cpu":
        return total
    info = mx.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or total)


def is_out_of_memory(error: Exception) -> bool:
    """Whether MLX or Python raised `error` for want of memory; MLX's own are RuntimeErrors."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(words in told for words in MEMORY_WORDS)


class DeviceMemory:
    """The limits of this process and what it uses of them, in bytes."""

    def __init__(self, limit: str, cache_limit: str | None) -> None:
        whole = device_memory()
        self.limit = parse_bytes(limit, whole)
        self.cache_limit = parse_bytes(cache_limit, whole) if cache_limit else self.limit // 8
        self._trim_heap = _heap_trimmer()
        mx.set_memory_limit(self.limit)
        mx.set_cache_limit(self.cache_limit)
        if device_name() == "metal":
            recommended = int(mx.device_info()["max_recommended_working_set_size"])
            mx.set_wired_limit(min(self.limit, recommended))

    def read(self) -> Memory:
        """The present figures."""
        return Memory(
            active=mx.get_active_memory(),
            peak=mx.get_peak_memory(),
            cache=mx.get_cache_memory(),
            limit=self.limit,
        )

    def release(self) -> None:
        """Give the buffers that MLX keeps for reuse back to the system."""
        mx.clear_cache()

    def trim(self) -> None:
        """Give freed heap back too; takes milliseconds, so for when nothing runs.

        On a CPU device MLX's buffers come from malloc, which keeps what the largest batch took.
        """
        if self._trim_heap is not None:
            self._trim_heap(0)


def _heap_trimmer() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; other C libraries have none, or need none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
