"""OpenTelemetry spans and Prometheus metrics. Never prompt or completion text."""

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import logfire
from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from mlx_server import __version__
from mlx_server.schemas.internal import ChatPrompt, Finished, InferenceRequest, Usage

# Polled every few seconds: they would drown other spans.
UNTRACED_PATHS = frozenset({"/health", "/ready", "/metrics"})
UNTRACED_FOLDER = "/ui/"

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 30.0, 60.0, 120.0, 300.0),
)
LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


# spans

Attributes = dict[str, str | int | float]


def setup_tracing() -> None:
    """Spans leave the process only with a Logfire token or OTLP endpoint set."""
    logfire.configure(
        send_to_logfire="if-token-present",
        console=False,
        service_name="mlx-server",
        service_version=__version__,
        inspect_arguments=False,
        # Continue a caller's trace.
        distributed_tracing=True,
    )


def untraced(scope: MutableMapping[str, Any]) -> bool:
    path: str = scope.get("path", "")
    return path in UNTRACED_PATHS or path.startswith(UNTRACED_FOLDER)


@contextmanager
def _span(name: str, attributes: Attributes) -> Iterator[Span]:
    """Not made current, since another task may leave it."""
    span = trace.get_tracer("mlx_server", __version__).start_span(name, attributes=attributes)
    try:
        yield span
    except Exception as error:
        span.set_status(StatusCode.ERROR)
        span.set_attribute("error.type", type(error).__qualname__)
        raise
    finally:
        span.end()


@contextmanager
def _request_span(
    operation: str, model: str, request_id: str, attributes: Attributes
) -> Iterator[Span]:
    """Follows the GenAI semantic conventions."""
    common: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "mlx_server",
        "gen_ai.request.model": model,
        "mlx_server.request_id": request_id,
    }
    with _span(f"{operation} {model}", common | attributes) as span:
        yield span


class InferenceSpan:
    def __init__(self, span: Span) -> None:
        self._span = span
        self._started = time.perf_counter()
        self._waiting = True
        self._reasons: list[str] = []
        self._output_tokens = 0

    def model(self, model: str) -> None:
        """The answering model's id, never an alias."""
        self._span.set_attribute("gen_ai.response.model", model)

    def first_token(self) -> None:
        """Only the first call counts."""
        if self._waiting:
            self._waiting = False
            seconds = time.perf_counter() - self._started
            self._span.set_attribute("gen_ai.server.time_to_first_token", seconds)

    def finished(self, choice: Finished) -> None:
        """Call once per choice."""
        self._reasons.append(choice.reason)
        self._output_tokens += choice.usage.completion_tokens
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": choice.usage.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": choice.usage.cached_tokens,
                "gen_ai.usage.output_tokens": self._output_tokens,
                "gen_ai.response.finish_reasons": tuple(self._reasons),
            }
        )


@contextmanager
def inference_span(request: InferenceRequest) -> Iterator[InferenceSpan]:
    operation = "chat" if isinstance(request.prompt, ChatPrompt) else "text_completion"
    attributes: Attributes = {
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.request.top_k": request.sampling.top_k,
        "gen_ai.request.frequency_penalty": request.sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": request.sampling.presence_penalty,
        "gen_ai.request.choice.count": request.n,
    }
    if request.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = request.max_tokens
    if request.seed is not None:
        attributes["gen_ai.request.seed"] = request.seed
    request_id = request.caller.request_id
    with _request_span(operation, request.model, request_id, attributes) as span:
        yield InferenceSpan(span)


class EmbeddingsSpan:
    def __init__(self, span: Span) -> None:
        self._span = span

    def accepted(self, model: str, input_tokens: int) -> None:
        self._span.set_attribute("gen_ai.response.model", model)
        self._span.set_attribute("gen_ai.usage.input_tokens", input_tokens)


@contextmanager
def embeddings_span(model: str, inputs: int, request_id: str) -> Iterator[EmbeddingsSpan]:
    attributes: Attributes = {"mlx_server.inputs": inputs}
    with _request_span("embeddings", model, request_id, attributes) as span:
        yield EmbeddingsSpan(span)


class LoadSpan:
    def __init__(self, span: Span) -> None:
        self._span = span

    def loaded(self, **attributes: str | int | float) -> None:
        self._span.set_attributes({f"mlx_server.{key}": v for key, v in attributes.items()})


@contextmanager
def load_span(model: str) -> Iterator[LoadSpan]:
    with _span(f"load {model}", {"gen_ai.request.model": model}) as span:
        yield LoadSpan(span)


# metrics


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "mlx_server_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "mlx_server_requests_in_flight", "HTTP requests in work.", registry=self.registry
        )
        self.prompt_tokens = self._tokens("prompt_tokens", "Prompt tokens of finished requests.")
        self.cached_tokens = self._tokens(
            "prompt_tokens_cached", "Prompt tokens of finished requests that a cache held."
        )
        self.generation_tokens = self._tokens(
            "generation_tokens", "Completion tokens of finished requests."
        )
        self.time_to_first_token = self._seconds(
            "time_to_first_token_seconds", "From a request's arrival to its first text."
        )
        self.inter_token_latency = self._seconds(
            "inter_token_latency_seconds", "Between successive pieces of a choice's text."
        )
        self.e2e_latency = self._seconds(
            "e2e_request_latency_seconds", "From a request's arrival to its end."
        )
        self.loop_lag = LoopLag(self.registry)
        tasks = Gauge("mlx_server_tasks", "Tasks of the event loop.", registry=self.registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))  # collected on the loop

    def _tokens(self, name: str, help: str) -> Counter:
        return Counter(f"mlx_server_{name}", help, ["model"], registry=self.registry)

    def _seconds(self, name: str, help: str) -> Histogram:
        return Histogram(
            f"mlx_server_{name}", help, ["model"], buckets=SECONDS, registry=self.registry
        )


class RequestTimer:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._last: dict[Hashable, float] = {}
        self._model = ""
        self._gaps: Histogram | None = None

    def opened(self, model: str) -> None:
        self._model = model
        self._gaps = self._metrics.inter_token_latency.labels(model)

    def text(self, choice: Hashable) -> None:
        now = time.perf_counter()
        last = self._last.get(choice)
        if last is not None and self._gaps is not None:
            self._gaps.observe(now - last)
        elif not self._last:
            self._metrics.time_to_first_token.labels(self._model).observe(now - self._started)
        self._last[choice] = now

    def finished(self, usage: Usage) -> None:
        seconds = time.perf_counter() - self._started
        self._metrics.e2e_latency.labels(self._model).observe(seconds)
        self._metrics.prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._metrics.cached_tokens.labels(self._model).inc(usage.cached_tokens)
        self._metrics.generation_tokens.labels(self._model).inc(usage.completion_tokens)


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
