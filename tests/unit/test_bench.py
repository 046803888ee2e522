"""`bench`: figures from timings, and what limits a server concluded from them."""

import dataclasses
import io

import pytest
from rich.console import Console

from mlx_server.cli.bench.command import _plot, _table
from mlx_server.cli.bench.figures import Level, ServerState, Timing, measure
from mlx_server.cli.bench.limits import verdict


def level(streams: int, rate: float, **more: object) -> Level:
    plain = Level(streams, streams, 1.0, rate, 0.0, 1.0, 0.1, 0.2, 0.01, 0.02, ())
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def test_figures_count_what_was_answered_and_keep_what_failed() -> None:
    timings = [
        Timing(first=0.1, tokens=10, prompt_tokens=100, gaps=[0.01] * 9),
        Timing(first=0.3, tokens=30, prompt_tokens=100, gaps=[0.02] * 29),
        Timing(error="503: the queue is full"),
    ]
    figures = measure(3, timings, seconds=2.0, client_cpu=0.1, server=None)
    assert (figures.output_rate, figures.input_rate, figures.request_rate) == (20.0, 100.0, 1.0)
    assert (figures.ttft_p50, figures.ttft_p95) == (0.3, 0.3)
    assert (figures.itl_p50, figures.itl_p95) == (0.02, 0.02)
    assert figures.errors == ("503: the queue is full",)


@pytest.mark.parametrize("width", [30, 40, 80])
def test_the_table_and_the_plot_fit_and_no_figure_is_cut(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    levels = [level(1, 335.7), level(16, 11070.5)]
    console.print(_table(levels, width))
    _plot(console, levels)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert shown.count("11,070.5") == 2
    assert max(map(len, shown.splitlines())) <= width


SATURATED = (level(1, 10), level(2, 19), level(4, 30))


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ((level(1, 10), level(2, 19)), "Try --concurrency 4"),
        ((level(1, 10),), "give several"),
        ((*SATURATED, level(8, 30, itl_p50=0.03)), "From 4 streams on: the device"),
        ((*SATURATED, level(8, 30, ttft_p50=1.0)), "10.0 times later"),
        (
            (*SATURATED, level(8, 30, server=ServerState(running=4, waiting=4))),
            "4 ran and 4 waited. Raise `max_batch`",
        ),
        ((*SATURATED, level(8, 30, server=ServerState(8, 0, preempted=2))), "raise `kv_cache`"),
        ((*SATURATED, level(8, 30, client_cpu=0.97)), "This client"),
        ((*SATURATED, level(8, 0, errors=("503: full",))), "1 of 8 requests failed: 503: full"),
    ],
)
def test_what_limits_is_told(levels: tuple[Level, ...], says: str) -> None:
    assert says in verdict(levels)
