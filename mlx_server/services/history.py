"""The last hour's figures, for charts."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.status import ModelStatus
from mlx_server.telemetry.metrics import Metrics

INTERVAL = 5.0
"""Seconds."""
KEPT = 720

Buckets = dict[float, float]
"""Observations up to each bound."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds, interpolated within buckets as Prometheus does; None without observations."""

    p50: float | None
    p95: float | None


@dataclass(frozen=True, slots=True)
class ModelSample:
    running: int
    waiting: int
    kv_bytes: int
    prefix_cache_bytes: int
    memory_bytes: int
    restarts: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Of the interval before `at`, which is since the epoch; rates are per second."""

    at: float
    prompt_tokens_rate: float
    cached_tokens_rate: float
    generation_tokens_rate: float
    requests_rate: float
    errors_rate: float
    time_to_first_token: Quantiles
    inter_token_latency: Quantiles
    event_loop_lag_p99: float
    models: Mapping[str, ModelSample]


@dataclass(frozen=True, slots=True)
class _Totals:
    at: float
    prompt: float
    cached: float
    generated: float
    ended: float
    failed: float
    first_token: Buckets
    inter_token: Buckets


class History:
    def __init__(self, pool: ModelPoolManager, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._samples: deque[Sample] = deque(maxlen=KEPT)

    def since(self, at: float) -> list[Sample]:
        """Oldest first."""
        return [sample for sample in self._samples if sample.at > at]

    async def run(self) -> None:
        before = self._totals()
        while True:
            await asyncio.sleep(INTERVAL)
            now = self._totals()
            self._samples.append(self._sample(before, now))
            before = now

    def _sample(self, before: _Totals, now: _Totals) -> Sample:
        seconds = max(now.at - before.at, 1e-3)
        return Sample(
            at=time.time(),
            prompt_tokens_rate=(now.prompt - before.prompt) / seconds,
            cached_tokens_rate=(now.cached - before.cached) / seconds,
            generation_tokens_rate=(now.generated - before.generated) / seconds,
            requests_rate=(now.ended - before.ended) / seconds,
            errors_rate=(now.failed - before.failed) / seconds,
            time_to_first_token=_quantiles(before.first_token, now.first_token),
            inter_token_latency=_quantiles(before.inter_token, now.inter_token),
            event_loop_lag_p99=self._metrics.loop_lag.quantile(0.99),
            models={one.id: _of(one) for one in self._pool.statuses() if one.pid is not None},
        )

    def _totals(self) -> _Totals:
        tokens, latencies = self._metrics.tokens, self._metrics.latencies
        endings = _by_label(self._metrics.endings, "finished_reason")
        return _Totals(
            at=time.monotonic(),
            prompt=_total(tokens.prompt),
            cached=_total(tokens.cached),
            generated=_total(tokens.generation),
            ended=sum(endings.values()),
            failed=endings.get("error", 0.0),
            first_token=_buckets(latencies.first_token),
            inter_token=_buckets(latencies.inter_token),
        )


def quantile(counts: Sequence[tuple[float, float]], q: float) -> float | None:
    """`counts` are observations up to each bound, which rise to infinity."""
    total = counts[-1][1] if counts else 0.0
    if not total:
        return None
    rank, lower, below = q * total, 0.0, 0.0
    for bound, count in counts:
        if count >= rank:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (rank - below) / max(count - below, 1e-9)
        lower, below = bound, count
    return lower


def _quantiles(before: Buckets, now: Buckets) -> Quantiles:
    counts = [(bound, now[bound] - before.get(bound, 0.0)) for bound in sorted(now)]
    return Quantiles(quantile(counts, 0.5), quantile(counts, 0.95))


def _of(status: ModelStatus) -> ModelSample:
    return ModelSample(
        running=status.running,
        waiting=status.waiting,
        kv_bytes=status.kv_bytes,
        prefix_cache_bytes=status.prefix_cache.bytes if status.prefix_cache else 0,
        memory_bytes=status.memory.active if status.memory else 0,
        restarts=status.restarts,
    )


def _samples(metric: Counter | Histogram, suffix: str) -> Iterable[tuple[Mapping[str, str], float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(suffix):
                yield sample.labels, sample.value


def _total(counter: Counter) -> float:
    return sum(value for _, value in _samples(counter, "_total"))


def _by_label(counter: Counter, label: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for labels, value in _samples(counter, "_total"):
        sums[labels[label]] = sums.get(labels[label], 0.0) + value
    return sums


def _buckets(histogram: Histogram) -> Buckets:
    """Of all models."""
    sums: Buckets = {}
    for labels, value in _samples(histogram, "_bucket"):
        bound = float(labels["le"])
        sums[bound] = sums.get(bound, 0.0) + value
    return sums
