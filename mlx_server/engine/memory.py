"""The device and its memory: asked, limited, released. Engine side only."""

import contextlib
from collections.abc import Mapping

import mlx.core as mx
import psutil

from mlx_server.engine.cpu import cgroup, graph, heap
from mlx_server.engine.protocol import Device, Memory
from mlx_server.engine.wiring import Wiring

CACHE_SHARE = 8
"""Freed buffers take at most the memory limit divided by this, if nothing else is said."""


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: MLX's default device."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def read_device() -> Device:
    name = device_name()
    if name == "cpu":
        host = _host_memory()
        return Device(name, memory=host, usable=host, packs=graph.available())
    return describe(name, mx.device_info(), _host_memory())


def describe(name: str, info: Mapping[str, str | int], host: int) -> Device:
    """The device `name` of which MLX says `info`, in a machine or container of `host` bytes."""
    match name:
        case "metal":
            recommended = int(info["max_recommended_working_set_size"])
            memory = int(info["memory_size"])
            return Device(name, memory, usable=recommended, wirable=recommended)
        case "cuda":
            return Device(name, memory=int(info["total_memory"]), usable=int(info["free_memory"]))
    return Device(name, memory=host, usable=host)


def _host_memory() -> int:
    total = int(psutil.virtual_memory().total)
    return min(total, cgroup.memory_limit() or total)


def device_works() -> bool:
    """Whether the device can still add, once it has reported what earlier work came to."""
    with contextlib.suppress(RuntimeError):
        mx.synchronize()
    try:
        return mx.array([1, 2]).sum().item() == 3
    except (RuntimeError, ValueError, MemoryError):
        return False


class DeviceMemory:
    """This process's limits and use, in bytes."""

    def __init__(
        self,
        limit: str,
        cache_limit: str | None,
        wired_limit: int = 0,
        device: Device | None = None,
    ) -> None:
        self.device = device or read_device()
        self.limit = self.device.budget(limit)
        self.cache_limit = (
            self.device.budget(cache_limit) if cache_limit else self.limit // CACHE_SHARE
        )
        self._trim_heap = heap.trimmer()
        mx.set_memory_limit(self.limit)
        kept = self.device.name == "cpu" and heap.keep_freed(self.cache_limit)
        mx.set_cache_limit(0 if kept else self.cache_limit)
        self.wiring = Wiring(min(wired_limit, self.device.wirable))

    def read(self) -> Memory:
        return Memory(
            active=mx.get_active_memory(),
            peak=mx.get_peak_memory(),
            cache=mx.get_cache_memory(),
            limit=self.limit,
            wired=self.wiring.wired,
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
