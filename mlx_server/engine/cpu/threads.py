"""How many threads BLAS has: as many as there are processors that nothing else uses.

OpenBLAS's threads wait for each other within a product, and keep a processor while they do. Where
they outnumber the free ones, they wait for threads that cannot run meanwhile: two engines on two
processors were more than 20 times as slow together as alone. Products are the same, to the last
bit, by 1 to 8 threads (SkylakeX kernels, two processors).
"""

import os
import time
from typing import Any, NamedTuple

import mlx.core as mx
import psutil

INTERVAL = 0.25
"""Seconds between looks at what the processors do."""
CERTAIN = 0.6
"""By how many processors what is free must differ from what is used before that changes."""


def wanted(threads: int, most: int, free: float) -> int:
    """Of up to `most`, where `threads` are used now, and `free` processors by nothing else."""
    if abs(free - threads) < CERTAIN:
        return threads
    return max(1, min(most, round(free)))


class _Use(NamedTuple):
    at: float
    all: float
    """Seconds for which this process's processors have worked, for whomever."""
    own: float


class BlasThreads:
    """Those of all BLAS libraries of this process, MLX's and NumPy's. To be asked for products by
    one thread alone.
    """

    def __init__(self) -> None:
        self._processors = _processors()
        self._libraries = _libraries()
        self.most = max((library.num_threads for library in self._libraries), default=1)
        self.number = self.most
        self._last: _Use | None = None

    def share(self) -> None:
        """Take as many as were free in the last moments; for between two turns."""
        last = self._last
        if self.most == 1 or (last is not None and time.monotonic() - last.at < INTERVAL):
            return
        self._last = use = self._use()
        if last is not None:
            others = (use.all - last.all - (use.own - last.own)) / (use.at - last.at)
            self._set(wanted(self.number, self.most, len(self._processors) - others))

    def rest(self) -> None:
        """What the processors do until there is work again, shall not count."""
        self._last = None

    def _set(self, number: int) -> None:
        if number == self.number:
            return
        mx.synchronize()  # no product may be under way
        for library in self._libraries:
            library.set_num_threads(number)
        self.number = number

    def _use(self) -> _Use:
        times = psutil.cpu_times(percpu=True)
        mine = [times[i] for i in self._processors if i < len(times)]
        worked = sum(one.user + one.nice + one.system for one in mine)
        return _Use(time.monotonic(), worked, time.process_time())


def _processors() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _libraries() -> list[Any]:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # comes with the extra `cpu`, as MLX's own BLAS does
        return []
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)
