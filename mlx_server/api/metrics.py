"""`GET /metrics`: figures in Prometheus' text format."""

from collections.abc import Iterator

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from mlx_server.api.http.dependencies import MetricsDep, authenticated
from mlx_server.api.openai.wire import documented
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.status import ModelStatus

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses=documented(400, 401, 413) | {200: {"content": {"text/plain": {}}}},
    dependencies=[Depends(authenticated)],
)
async def metrics(metrics: MetricsDep) -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


class PoolCollector(Collector):
    def __init__(self, pool: ModelPoolManager) -> None:
        self._pool = pool

    def describe(self) -> Iterator[Metric]:
        """Registering must not query a pool that has not started."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        statuses = self._pool.statuses()
        loaded = [status for status in statuses if status.state == "ready"]
        yield GaugeMetricFamily("mlx_server_models_loaded", "Models loaded.", value=len(loaded))
        yield from self._per_model(statuses)
        yield from self._prefix_caches(loaded)
        yield from self._disk_caches(loaded)
        memory = GaugeMetricFamily(
            "mlx_server_memory_bytes", "An engine's device memory.", labels=["model", "kind"]
        )
        for status in statuses:
            if status.memory is not None:
                for kind in ("active", "peak", "cache", "limit", "wired"):
                    memory.add_metric([status.id, kind], getattr(status.memory, kind))
        yield memory

    def _per_model(self, statuses: list[ModelStatus]) -> Iterator[Metric]:
        figures = {
            "running": ("num_requests_running", "Sequences being generated."),
            "waiting": ("num_requests_waiting", "Sequences waiting for a place."),
            "kv_bytes": ("kv_cache_bytes", "KV caches of running sequences."),
            "step_seconds": ("decode_step_seconds", "What a decode step takes of late."),
        }
        for field, (name, help) in figures.items():
            gauge = GaugeMetricFamily(f"mlx_server_{name}", help, labels=["model"])
            for status in statuses:
                gauge.add_metric([status.id], getattr(status, field))
            yield gauge
        counts = {
            "preempted": ("preemptions", "Sequences that had to start over."),
            "restarts": ("engine_restarts", "Engines that ended and were replaced."),
        }
        for field, (name, help) in counts.items():
            counter = CounterMetricFamily(f"mlx_server_{name}", help, labels=["model"])
            for status in statuses:
                counter.add_metric([status.id], getattr(status, field))
            yield counter

    def _prefix_caches(self, loaded: list[ModelStatus]) -> Iterator[Metric]:
        labels = ["model"]
        held = GaugeMetricFamily(
            "mlx_server_prefix_cache_bytes", "Blocks of the prefix cache.", labels=labels
        )
        asked = CounterMetricFamily(
            "mlx_server_prefix_cache_queries", "Prompt tokens looked up.", labels=labels
        )
        found = CounterMetricFamily(
            "mlx_server_prefix_cache_hits", "Prompt tokens found.", labels=labels
        )
        for status in loaded:
            if status.prefix_cache is not None:
                held.add_metric([status.id], status.prefix_cache.bytes)
                asked.add_metric([status.id], status.prefix_cache.prompt_tokens)
                found.add_metric([status.id], status.prefix_cache.cached_tokens)
        yield from (held, asked, found)

    def _disk_caches(self, loaded: list[ModelStatus]) -> Iterator[Metric]:
        figures = {
            "written_bytes": "Bytes of prefixes written to the disk.",
            "read_bytes": "Bytes of prefixes read back from the disk.",
            "refused_blocks": "Blocks for which the disk, its limit or the day's had no room.",
        }
        for field, help in figures.items():
            counter = CounterMetricFamily(f"mlx_server_disk_cache_{field}", help, labels=["model"])
            for status in loaded:
                if status.prefix_cache is not None and status.prefix_cache.disk is not None:
                    counter.add_metric([status.id], getattr(status.prefix_cache.disk, field))
            yield counter
