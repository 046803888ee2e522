"""Spans: where they go, and how they are made."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode

from mlx_server import __version__
from mlx_server.events import event

# Polled every few seconds: they would drown other spans.
UNTRACED_PATHS = frozenset({"/health", "/ready", "/metrics"})
UNTRACED_FOLDER = "/ui/"

DESTINATIONS = (
    "LOGFIRE_TOKEN",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
)
"""Environment variables, of which one must be set for anything to leave this process."""
NANO = 1_000_000_000

Attribute = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Attribute]

log = logging.getLogger("mlx_server.telemetry")


def setup_tracing() -> None:
    """Without a destination no span is made."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    if not any(os.environ.get(name) for name in DESTINATIONS):
        return
    if os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").startswith("grpc"):
        log.warning(event("otlp_protocol_unsupported", used="http/protobuf"))
    # Takes as long to import as FastAPI.
    import logfire

    logfire.configure(
        send_to_logfire=bool(os.environ.get("LOGFIRE_TOKEN")),
        console=False,
        service_name=os.environ.get("OTEL_SERVICE_NAME") or "mlx-server",
        service_version=__version__,
        inspect_arguments=False,
        # Continue a caller's trace.
        distributed_tracing=True,
    )


def untraced(scope: MutableMapping[str, Any]) -> bool:
    path: str = scope.get("path", "")
    return path in UNTRACED_PATHS or path.startswith(UNTRACED_FOLDER)


def nanoseconds(at: float) -> int:
    """Since the epoch, of `at` on the performance counter."""
    return time.time_ns() - int((time.perf_counter() - at) * NANO)


def start_span(
    name: str, attributes: Attributes, parent: Span | None = None, at: float | None = None
) -> Span:
    """Not made current, since another task may end it. Without `parent`, below the current one."""
    context = None if parent is None else trace.set_span_in_context(parent)
    return trace.get_tracer("mlx_server", __version__).start_span(
        name,
        context,
        attributes=dict(attributes),
        start_time=None if at is None else nanoseconds(at),
    )


def fail_span(span: Span, kind: str) -> None:
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", kind)


class LoadSpan:
    def __init__(self, span: Span) -> None:
        self._span = span

    def loaded(self, **attributes: str | int | float) -> None:
        self._span.set_attributes({f"mlx_server.{key}": v for key, v in attributes.items()})


@contextmanager
def load_span(model: str) -> Iterator[LoadSpan]:
    span = start_span(f"load {model}", {"gen_ai.request.model": model})
    try:
        yield LoadSpan(span)
    except Exception as error:
        fail_span(span, type(error).__qualname__)
        raise
    finally:
        span.end()
