"""Prometheus metrics of requests. `api/metrics.py` adds those of the pool.

What means the same as in vLLM has vLLM's name and labels, so that dashboards, autoscalers and
gateways made for it work: https://docs.vllm.ai/en/stable/usage/metrics/
"""

import asyncio
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from mlx_server import __version__
from mlx_server.telemetry.lag import LoopLag

MODEL_LABELS = ("model_name", "engine")
ENGINE = "0"
"""vLLM numbers the engines of a model; here each has one."""

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 30.0, 60.0, 120.0, 300.0),
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
CHOICES = (1, 2, 5, 10, 20)

Ending = Literal["stop", "length", "abort", "error"]
ENDINGS: tuple[Ending, ...] = ("stop", "length", "abort", "error")


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("mlx_server_build", "The server's version.", registry=registry).info(
            {"version": __version__}
        )
        self.requests = Counter(
            "mlx_server_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "mlx_server_requests_in_flight", "HTTP requests in work.", registry=registry
        )
        self.loop_lag = LoopLag(registry)
        tasks = Gauge("mlx_server_tasks", "Tasks of the event loop.", registry=registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))  # collected on the loop
        self.tokens = _TokenCounters(registry)
        self.latencies = _Latencies(registry)
        self.sizes = _Sizes(registry)
        self.endings = _counter(
            registry, "request_success", "Completions that ended.", "finished_reason"
        )
        self._models: dict[str, ModelMetrics] = {}

    def of(self, model: str) -> "ModelMetrics":
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]


class ModelMetrics:
    """One model's, with their labels looked up."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        labels = (model, ENGINE)
        tokens, latencies, sizes = metrics.tokens, metrics.latencies, metrics.sizes
        self.prompt_tokens = tokens.prompt.labels(*labels)
        self.cached_tokens = tokens.cached.labels(*labels)
        self.generation_tokens = tokens.generation.labels(*labels)
        self.time_to_first_token = latencies.first_token.labels(*labels)
        self.inter_token_latency = latencies.inter_token.labels(*labels)
        self.time_per_output_token = latencies.per_output_token.labels(*labels)
        self.e2e_latency = latencies.end_to_end.labels(*labels)
        self.queue_time = latencies.queue.labels(*labels)
        self.prefill_time = latencies.prefill.labels(*labels)
        self.decode_time = latencies.decode.labels(*labels)
        self.inference_time = latencies.inference.labels(*labels)
        self.request_prompt_tokens = sizes.prompt.labels(*labels)
        self.request_generation_tokens = sizes.generation.labels(*labels)
        self.request_max_tokens = sizes.max_tokens.labels(*labels)
        self.request_choices = sizes.choices.labels(*labels)
        # All of them from the start: what has no sample yet has no rate.
        self.endings = {ending: metrics.endings.labels(*labels, ending) for ending in ENDINGS}


class _TokenCounters:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.prompt = _counter(
            registry, "prompt_tokens", "Prompt tokens of requests whose first token has come."
        )
        self.cached = _counter(
            registry, "prompt_tokens_cached", "Of those, tokens that the prefix cache held."
        )
        self.generation = _counter(registry, "generation_tokens", "Tokens sampled.")


class _Latencies:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.first_token = _histogram(
            registry,
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
        )
        self.inter_token = _histogram(
            registry, "inter_token_latency_seconds", "Between successive tokens of a completion."
        )
        self.per_output_token = _histogram(
            registry,
            "request_time_per_output_token_seconds",
            "A request's decode time by its tokens after the first.",
        )
        self.end_to_end = _histogram(
            registry, "e2e_request_latency_seconds", "From a request's arrival to its end."
        )
        self.queue = _histogram(
            registry,
            "request_queue_time_seconds",
            "From when the engine was sent a request to when it began.",
        )
        self.prefill = _histogram(
            registry,
            "request_prefill_time_seconds",
            "From when the engine began a request to its first token.",
        )
        self.decode = _histogram(
            registry,
            "request_decode_time_seconds",
            "From a request's first token to its last.",
        )
        self.inference = _histogram(
            registry,
            "request_inference_time_seconds",
            "From when the engine began a request to its last token.",
        )


class _Sizes:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.prompt = _histogram(
            registry, "request_prompt_tokens", "Prompt tokens of a request.", TOKENS
        )
        self.generation = _histogram(
            registry, "request_generation_tokens", "Tokens sampled for a request.", TOKENS
        )
        self.max_tokens = _histogram(
            registry, "request_params_max_tokens", "The token limit that a request set.", TOKENS
        )
        self.choices = _histogram(
            registry, "request_params_n", "Completions that a request asked for.", CHOICES
        )


def _counter(registry: CollectorRegistry, name: str, help: str, *labels: str) -> Counter:
    return Counter(f"vllm:{name}", help, (*MODEL_LABELS, *labels), registry=registry)


def _histogram(
    registry: CollectorRegistry, name: str, help: str, buckets: Sequence[float] = SECONDS
) -> Histogram:
    return Histogram(f"vllm:{name}", help, MODEL_LABELS, buckets=buckets, registry=registry)
