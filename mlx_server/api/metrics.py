"""`GET /metrics`: figures for Prometheus."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from mlx_server.api.http.dependencies import MetricsDep, authenticated
from mlx_server.api.openai.wire import documented
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.status import ModelStatus
from mlx_server.models.text.client import TextProcess
from mlx_server.telemetry.metrics import ENGINE, MODEL_LABELS

MEMORY_KINDS = ("active", "peak", "cache", "limit", "wired")

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses=documented(400, 401, 413) | {200: {"content": {"text/plain": {}}}},
    dependencies=[Depends(authenticated)],
)
async def metrics(metrics: MetricsDep) -> Response:
    """Prometheus' text format."""
    # Never OpenMetrics: the library writes the colon of vLLM's names as an underscore there.
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Figure(NamedTuple):
    """A figure of each model, None where a model has none."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    help: str
    of: Callable[[ModelStatus], float | None]


def _kv_usage(status: ModelStatus) -> float | None:
    return status.kv_bytes / status.kv_limit if status.kv_limit else None


def _of_prefixes(field: str) -> Callable[[ModelStatus], float | None]:
    return lambda one: getattr(one.prefix_cache, field) if one.prefix_cache else None


def _of_disk(field: str) -> Callable[[ModelStatus], float | None]:
    return lambda one: (
        getattr(one.prefix_cache.disk, field)
        if one.prefix_cache and one.prefix_cache.disk
        else None
    )


GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
FIGURES = (
    Figure(GAUGE, "vllm:num_requests_running", "Sequences computed.", lambda s: s.running),
    Figure(
        GAUGE,
        "vllm:num_requests_waiting",
        "Sequences that wait for a place.",
        lambda s: s.waiting,
    ),
    Figure(
        GAUGE,
        "vllm:kv_cache_usage_perc",
        "Running sequences' share of the KV limit, from 0 to 1.",
        _kv_usage,
    ),
    Figure(
        COUNTER,
        "vllm:num_preemptions",
        "Sequences that had to start over.",
        lambda s: s.preempted,
    ),
    Figure(
        COUNTER,
        "vllm:spec_decode_num_draft_tokens",
        "Tokens guessed.",
        lambda s: s.guessed,
    ),
    Figure(
        COUNTER,
        "vllm:spec_decode_num_accepted_tokens",
        "Guessed tokens that came true.",
        lambda s: s.accepted,
    ),
    Figure(
        COUNTER,
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up.",
        _of_prefixes("prompt_tokens"),
    ),
    Figure(
        COUNTER,
        "vllm:prefix_cache_hits",
        "Prompt tokens found.",
        _of_prefixes("cached_tokens"),
    ),
    Figure(
        GAUGE,
        "mlx_server_requests_waiting_for_model",
        "Requests that wait for the model to load.",
        lambda s: s.waiting_to_load,
    ),
    Figure(GAUGE, "mlx_server_kv_cache_bytes", "KV caches of sequences.", lambda s: s.kv_bytes),
    Figure(
        GAUGE,
        "mlx_server_decode_step_seconds",
        "What a decode step takes of late.",
        lambda s: s.step_seconds,
    ),
    Figure(
        GAUGE,
        "mlx_server_prefix_cache_bytes",
        "Blocks of the prefix cache in memory.",
        _of_prefixes("bytes"),
    ),
    Figure(GAUGE, "mlx_server_disk_cache_blocks", "Blocks on the disk.", _of_disk("blocks")),
    Figure(
        COUNTER,
        "mlx_server_disk_cache_written_bytes",
        "Bytes of prefixes written to the disk.",
        _of_disk("written_bytes"),
    ),
    Figure(
        COUNTER,
        "mlx_server_disk_cache_read_bytes",
        "Bytes of prefixes read back from the disk.",
        _of_disk("read_bytes"),
    ),
    Figure(
        COUNTER,
        "mlx_server_disk_cache_refused_blocks",
        "Blocks for which the disk, its limit or the day's had no room.",
        _of_disk("refused_blocks"),
    ),
    Figure(
        GAUGE,
        "mlx_server_model_reserved_bytes",
        "What is reserved for a model, or what it would take.",
        lambda s: s.need,
    ),
    Figure(
        GAUGE,
        "mlx_server_model_load_seconds",
        "What the last load took.",
        lambda s: s.load_seconds,
    ),
    Figure(COUNTER, "mlx_server_model_loads", "Loads begun.", lambda s: s.loads),
    Figure(COUNTER, "mlx_server_model_load_failures", "Loads that failed.", lambda s: s.failures),
    Figure(
        COUNTER,
        "mlx_server_engine_restarts",
        "Engines that ended and were replaced.",
        lambda s: s.restarts,
    ),
)


class PoolCollector(Collector):
    def __init__(self, pool: ModelPoolManager, texts: TextProcess) -> None:
        self._pool = pool
        self._texts = texts

    def describe(self) -> Iterator[Metric]:
        """Registering must not query a pool that has not started."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        statuses = self._pool.statuses()
        yield _models(statuses)
        yield GaugeMetricFamily(
            "mlx_server_memory_budget_bytes",
            "Memory for all models.",
            value=self._pool.planner.budget,
        )
        yield CounterMetricFamily(
            "mlx_server_text_process_ends",
            "Times that the process for templates and tokenizers ended.",
            value=self._texts.ends,
        )
        yield _memory(statuses)
        for figure in FIGURES:
            family = figure.kind(figure.name, figure.help, labels=MODEL_LABELS)
            for status in statuses:
                if (value := figure.of(status)) is not None:
                    family.add_metric([status.id, ENGINE], value)
            yield family


def _models(statuses: Iterable[ModelStatus]) -> Metric:
    family = GaugeMetricFamily("mlx_server_models", "Models by state.", labels=["state"])
    counts = Counter(status.state for status in statuses)
    for state in ("loading", "ready", "restarting", "draining", "failed"):
        family.add_metric([state], counts[state])
    return family


def _memory(statuses: Iterable[ModelStatus]) -> Metric:
    family = GaugeMetricFamily(
        "mlx_server_memory_bytes",
        "An engine's device memory, as MLX counts it.",
        labels=(*MODEL_LABELS, "kind"),
    )
    for status in statuses:
        if status.memory is not None:
            for kind in MEMORY_KINDS:
                family.add_metric([status.id, ENGINE, kind], getattr(status.memory, kind))
    return family
