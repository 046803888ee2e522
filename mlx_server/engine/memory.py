"""Device memory: read, limit, release. Engine side only."""

import mlx.core as mx
import psutil

from mlx_server.engine.cpu import heap
from mlx_server.engine.protocol import Memory
from mlx_server.units import parse_bytes

MEMORY_WORDS = ("unable to allocate", "attempting to allocate", "out of memory", "insufficient")
"""Phrases of MLX's allocators, on a CPU, Metal and CUDA."""


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: MLX's default device."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_memory() -> int:
    """Bytes, as MLX or the system reports them."""
    total = int(psutil.virtual_memory().total)
    if device_name() == "cpu":
        return total
    info = mx.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or total)


def is_out_of_memory(error: Exception) -> bool:
    """MLX raises RuntimeErrors for want of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in MEMORY_WORDS)


class DeviceMemory:
    """This process's limits and use, in bytes."""

    def __init__(self, limit: str, cache_limit: str | None) -> None:
        whole = device_memory()
        self.limit = parse_bytes(limit, whole)
        self.cache_limit = parse_bytes(cache_limit, whole) if cache_limit else self.limit // 8
        self._trim_heap = heap.trimmer()
        mx.set_memory_limit(self.limit)
        mx.set_cache_limit(self.cache_limit)
        if device_name() == "metal":
            recommended = int(mx.device_info()["max_recommended_working_set_size"])
            mx.set_wired_limit(min(self.limit, recommended))

    def read(self) -> Memory:
        return Memory(
            active=mx.get_active_memory(),
            peak=mx.get_peak_memory(),
            cache=mx.get_cache_memory(),
            limit=self.limit,
        )

    def release(self) -> None:
        """Give freed buffers back to the system."""
        mx.clear_cache()

    def release_excess(self) -> None:
        """Give freed buffers back if more have gathered than are kept for reuse."""
        if mx.get_cache_memory() > self.cache_limit:
            self.release()

    def release_all(self) -> None:
        """Give freed buffers and heap back. Takes milliseconds."""
        self.release()
        if self._trim_heap is not None:  # where MLX's buffers come from malloc
            self._trim_heap(0)
