"""What requests took, and the figures of one level of concurrency."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Timing:
    """One request, in seconds; `tokens` are those the server says it generated."""

    first: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class ServerState:
    """What our own server said of the model meanwhile: the most of each."""

    running: int = 0
    waiting: int = 0
    preempted: int = 0


@dataclass(frozen=True)
class Level:
    """Rates are per second, latencies in seconds; `client_cpu` is a share of one core."""

    concurrency: int
    requests: int
    seconds: float
    output_rate: float
    input_rate: float
    request_rate: float
    ttft_p50: float
    ttft_p95: float
    itl_p50: float
    itl_p95: float
    errors: tuple[str, ...]
    client_cpu: float = 0.0
    server: ServerState | None = None


def measure(
    concurrency: int,
    timings: Sequence[Timing],
    seconds: float,
    client_cpu: float,
    server: ServerState | None,
) -> Level:
    done = [timing for timing in timings if timing.error is None]
    first = [timing.first for timing in done if timing.first is not None]
    gaps = [gap for timing in done for gap in timing.gaps]
    return Level(
        concurrency=concurrency,
        requests=len(timings),
        seconds=seconds,
        output_rate=sum(timing.tokens for timing in done) / seconds,
        input_rate=sum(timing.prompt_tokens for timing in done) / seconds,
        request_rate=len(done) / seconds,
        ttft_p50=quantile(first, 0.5),
        ttft_p95=quantile(first, 0.95),
        itl_p50=quantile(gaps, 0.5),
        itl_p95=quantile(gaps, 0.95),
        errors=tuple(timing.error for timing in timings if timing.error is not None),
        client_cpu=client_cpu,
        server=server,
    )


def quantile(values: Sequence[float], q: float) -> float:
    """0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
