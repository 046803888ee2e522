"""How figures are made: from streamed answers, and over rounds; medians, spreads and ratios."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from benchmarks.client import Answer

Figures = dict[str, float]
"""What one run of one cell gave: heading to value. A heading ends in the unit, if it has one."""
Outcome = tuple[str, Figures]
"""A cell's name and its figures."""

RATE = "tokens/s"
DECODE_RATE = "decode tokens/s"


class Measurement(msgspec.Struct, frozen=True):
    """One server's figures in one cell and one round."""

    server: str
    round: int
    cell: str
    figures: Figures


@dataclass(frozen=True)
class Spread:
    """Median and extremes of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """The spread of `values`; None where there are none."""
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_shown(self.median)} ({_shown(self.low)}-{_shown(self.high)})"


def _shown(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def throughput(answers: Sequence[Answer], max_tokens: int) -> Figures:
    """The figures of answers that ran together.

    `tokens/s` counts completion tokens from the first request sent to the last byte received,
    prefill included. `short` counts the answers that ended before `max_tokens`.
    """
    tokens = sum(answer.completion_tokens for answer in answers)
    wall = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    ttft = [answer.ttft for answer in answers]
    gaps = [gap * 1000 for answer in answers for gap in answer.gaps()]
    figures = {
        RATE: tokens / wall,
        DECODE_RATE: _decode_rate(answers),
        "TTFT p50 s": percentile(ttft, 0.5),
        "TTFT p99 s": percentile(ttft, 0.99),
    }
    if gaps:
        figures |= {"ITL p50 ms": percentile(gaps, 0.5), "ITL p99 ms": percentile(gaps, 0.99)}
    short = sum(answer.completion_tokens < max_tokens for answer in answers)
    return figures | {"tokens": tokens, "short": short}


def _decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second once every answer has begun and until the first one ends.

    That is the window in which all streams decode. A job with more requests than streams, or
    with answers too short to overlap, has no such window: there, from first to last arrival.
    """
    begin = max(answer.arrivals[0] for answer in answers)
    end = min(answer.arrivals[-1] for answer in answers)
    if end <= begin:
        begin = min(answer.arrivals[0] for answer in answers)
        end = max(answer.arrivals[-1] for answer in answers)
    seconds = end - begin
    if seconds <= 0:
        return 0.0
    return sum(_tokens_between(answer, begin, end) for answer in answers) / seconds


def _tokens_between(answer: Answer, begin: float, end: float) -> float:
    """The tokens of `answer` that arrived in (begin, end], each chunk counted alike."""
    inside = sum(begin < arrival <= end for arrival in answer.arrivals)
    return answer.completion_tokens * inside / len(answer.arrivals)
