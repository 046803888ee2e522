"""How late the event loop is."""

import asyncio
import time
from collections import deque

from prometheus_client import CollectorRegistry, Gauge, Histogram

LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LoopLag:
    """How late the event loop wakes from sleeps: shows whatever blocks it."""

    TICK = 0.05
    WINDOW = 1200
    """Ticks of a minute."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._window: deque[float] = deque(maxlen=self.WINDOW)
        self._histogram = Histogram(
            "mlx_server_event_loop_lag_seconds",
            "How late the event loop wakes a tick.",
            buckets=LAG_SECONDS,
            registry=registry,
        )
        p99 = Gauge(
            "mlx_server_event_loop_lag_p99_seconds",
            "The 99th percentile of the loop's lag over the last minute.",
            registry=registry,
        )
        p99.set_function(lambda: self.quantile(0.99))

    async def run(self) -> None:
        while True:
            # The loop's clock may count whole milliseconds.
            due = time.perf_counter() + self.TICK
            await asyncio.sleep(self.TICK)
            lag = max(0.0, time.perf_counter() - due)
            self._window.append(lag)
            self._histogram.observe(lag)

    def quantile(self, q: float) -> float:
        """Over the last minute, in seconds; 0 before the first tick."""
        ordered = sorted(self._window)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
