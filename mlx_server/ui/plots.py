"""What each chart shows of the server's history, as options of ECharts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

Sample = dict[str, Any]
Values = list[float | None]
Lines = dict[str, Values]
STEP = 15.0
"""Seconds that one point of a chart stands for."""
COLOURS = ("#6366f1", "#f59e0b", "#10b981", "#ef4444", "#06b6d4", "#a855f7")
"""To be seen on light and on dark, as the next two."""
SOFT = "#8b90a0"
GRID = "#8b90a033"
GIGA = 1e9


@dataclass(frozen=True)
class Chart:
    """`read` gives each line's values, one for each sample; None is a gap."""

    title: str
    unit: str
    read: Callable[[Sequence[Sample]], Lines]
    stacked: bool = False
    sparse: bool = False
    """With gaps, between which a single value is a point."""


def options(chart: Chart, samples: Sequence[Sample]) -> dict[str, Any]:
    spans = list(_spans(samples))
    lines = {
        name: [_mean(values[span]) for span in spans]
        for name, values in chart.read(samples).items()
    }
    times = [round(1000 * samples[span.stop - 1]["at"]) for span in spans]
    area = {"stack": "all", "areaStyle": {"opacity": 0.3}} if chart.stacked else {}
    return {
        "animation": False,
        "aria": {"enabled": True, "label": {"description": described(chart, lines)}},
        "color": COLOURS,
        "textStyle": {"color": SOFT},
        "tooltip": {"trigger": "axis", "confine": True},
        "legend": {"textStyle": {"color": SOFT}, "bottom": 0, "icon": "circle"},
        "grid": {"left": 8, "right": 32, "top": 28, "bottom": 32, "containLabel": True},
        "xAxis": {"type": "time", "axisLabel": {"color": SOFT, "hideOverlap": True}},
        "yAxis": {
            "type": "value",
            "min": 0,
            "name": chart.unit,
            "nameTextStyle": {"color": SOFT, "align": "left"},
            "axisLabel": {"color": SOFT},
            "splitLine": {"lineStyle": {"color": GRID}},
        },
        # Times are sent once for all lines.
        "dataset": {"source": {"time": times, **lines}},
        "series": [
            {
                "name": name,
                "type": "line",
                "showSymbol": chart.sparse,
                "symbolSize": 3,
                "lineStyle": {"width": 2},
                "encode": {"x": "time", "y": name},
                **area,
            }
            for name in lines
        ],
    }


def described(chart: Chart, lines: Lines) -> str:
    """The latest values, for who does not see them."""
    told = (
        f"{name} {values[-1]:,.10g}"
        for name, values in lines.items()
        if values and values[-1] is not None
    )
    return f"{chart.title}, {chart.unit}: {', '.join(told) or 'nothing yet'}"


def _spans(samples: Sequence[Sample]) -> Iterator[slice]:
    """The samples of each point."""
    start = 0
    for _, group in groupby(samples, key=lambda sample: sample["at"] // STEP):
        stop = start + len(list(group))
        yield slice(start, stop)
        start = stop


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None


# what is read of the samples


def _tokens(samples: Sequence[Sample]) -> Lines:
    return {
        "in": [sample["prompt_tokens_rate"] for sample in samples],
        "out": [sample["generation_tokens_rate"] for sample in samples],
    }


def _quantiles(name: str) -> Callable[[Sequence[Sample]], Lines]:
    """In milliseconds."""

    def read(samples: Sequence[Sample]) -> Lines:
        return {
            quantile: [
                None if (found := sample[name][quantile]) is None else 1000 * found
                for sample in samples
            ]
            for quantile in ("p50", "p95")
        }

    return read


def _requests(samples: Sequence[Sample]) -> Lines:
    return {name: [_total(sample, name) for sample in samples] for name in ("running", "waiting")}


def _memory(samples: Sequence[Sample]) -> Lines:
    names = dict.fromkeys(name for sample in samples for name in sample["models"])
    return {
        name: [
            found["memory_bytes"] / GIGA if (found := sample["models"].get(name)) else 0.0
            for sample in samples
        ]
        for name in names
    }


def _cached(samples: Sequence[Sample]) -> Lines:
    return {
        "from the cache": [
            100 * sample["cached_tokens_rate"] / asked
            if (asked := sample["prompt_tokens_rate"])
            else None
            for sample in samples
        ]
    }


def _replaced(samples: Sequence[Sample]) -> Lines:
    """A model's count, which goes with it, only rises while it is loaded."""
    counts = [_total(sample, "restarts") for sample in samples]
    risen = [max(0.0, after - before) for before, after in pairwise(counts)]
    return {"replaced": [0.0, *risen] if counts else []}


def _total(sample: Sample, name: str) -> float:
    return float(sum(model[name] for model in sample["models"].values()))


CHARTS = (
    Chart("Tokens", "tokens/s", _tokens),
    Chart("Requests", "requests", _requests),
    Chart("Time to first token", "ms", _quantiles("time_to_first_token"), sparse=True),
    Chart("Between tokens", "ms", _quantiles("inter_token_latency"), sparse=True),
    Chart("Memory", "GB", _memory, stacked=True),
    Chart("Prompts", "%", _cached, sparse=True),
    Chart("Engines", "replaced", _replaced),
)
