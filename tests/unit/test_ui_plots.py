"""What the page's charts make of the server's history."""

from typing import Any

from mlx_server.ui.plots import CHARTS, STEP, options

MODEL = {"running": 2, "waiting": 1, "memory_bytes": 3 * 10**9, "restarts": 1}
BUSY: dict[str, Any] = {
    "at": 10 * STEP,
    "prompt_tokens_rate": 20.0,
    "cached_tokens_rate": 5.0,
    "generation_tokens_rate": 3.0,
    "time_to_first_token": {"p50": 0.1, "p95": 0.5},
    "inter_token_latency": {"p50": 0.01, "p95": 0.02},
    "models": {"a": MODEL},
}
NONE = {"p50": None, "p95": None}
QUIET = BUSY | {
    "at": 11 * STEP,
    "prompt_tokens_rate": 0.0,
    "cached_tokens_rate": 0.0,
    "time_to_first_token": NONE,
    "models": {},
}


def drawn(title: str, *samples: dict[str, Any]) -> dict[str, list[Any]]:
    """Each line's values."""
    chart = next(chart for chart in CHARTS if chart.title == title)
    lines: dict[str, list[Any]] = options(chart, samples)["dataset"]["source"]
    assert len(lines.pop("time")) == len({sample["at"] // STEP for sample in samples})
    return lines


def test_rates_are_plain_and_times_are_milliseconds() -> None:
    assert drawn("Tokens", BUSY, QUIET) == {"in": [20.0, 0.0], "out": [3.0, 3.0]}
    first = drawn("Time to first token", BUSY, QUIET)
    assert first == {"p50": [100.0, None], "p95": [500.0, None]}


def test_samples_that_are_close_make_one_point_and_those_without_a_value_do_not_count() -> None:
    near = [BUSY, QUIET | {"at": BUSY["at"] + STEP / 3}]
    assert drawn("Tokens", *near)["in"] == [10.0]
    assert drawn("Time to first token", *near)["p50"] == [100.0]


def test_shares_of_nothing_are_gaps_and_models_that_are_gone_hold_nothing() -> None:
    assert drawn("Prompts", BUSY, QUIET) == {"from the cache": [25.0, None]}
    assert drawn("Memory", BUSY, QUIET) == {"a": [3.0, 0.0]}
    assert drawn("Requests", BUSY, QUIET) == {"running": [2.0, 0.0], "waiting": [1.0, 0.0]}


def test_engines_count_when_they_are_replaced_and_not_when_they_go() -> None:
    more = BUSY | {"at": 12 * STEP, "models": {"a": MODEL | {"restarts": 3}}}
    gone = QUIET | {"at": 13 * STEP}
    assert drawn("Engines", BUSY, more, gone) == {"replaced": [0.0, 2.0, 0.0]}


def test_before_the_first_sample_all_charts_are_empty() -> None:
    for chart in CHARTS:
        assert not any(drawn(chart.title).values())
