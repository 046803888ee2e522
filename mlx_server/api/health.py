"""What machines ask for: is it alive, can it generate, what are its figures."""

from collections.abc import Iterator

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from mlx_server.api.dependencies import MetricsDep, PoolDep, authenticated
from mlx_server.api.errors import documented
from mlx_server.errors import Unavailable
from mlx_server.models.pool import ModelPoolManager

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


@router.get("/ready", responses=documented(503))
async def ready(pool: PoolDep) -> dict[str, str]:
    """Whether every model named at the start can generate."""
    if not pool.ready:
        reason = pool.not_ready_reason or "The server is not ready."
        raise Unavailable(reason, code="not_ready", retry_after=1)
    return {"status": "ready"}


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=documented(401),
    dependencies=[Depends(authenticated)],
)
async def metrics(metrics: MetricsDep) -> Response:
    """The figures, in Prometheus' text format."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


class PoolCollector(Collector):
    """The models' figures, as they are when Prometheus asks."""

    def __init__(self, pool: ModelPoolManager) -> None:
        self._pool = pool

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: registering must not ask a pool that has not started."""
        yield from ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        statuses = self._pool.statuses()
        loaded = sum(status.state == "ready" for status in statuses)
        yield GaugeMetricFamily("mlx_server_models_loaded", "Models loaded.", value=loaded)
        running = _per_model("mlx_server_num_requests_running", "Sequences being generated.")
        waiting = _per_model("mlx_server_num_requests_waiting", "Sequences waiting for a place.")
        memory = GaugeMetricFamily(
            "mlx_server_memory_bytes", "An engine's device memory.", labels=["model", "kind"]
        )
        for status in statuses:
            running.add_metric([status.id], status.running)
            waiting.add_metric([status.id], status.waiting)
            if status.memory is not None:
                for kind in ("active", "peak", "cache", "limit"):
                    memory.add_metric([status.id, kind], getattr(status.memory, kind))
        yield from (running, waiting, memory)


def _per_model(name: str, help: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, labels=["model"])
