"""What is measured and how figures are made of it: cells, jobs, samples, medians and spreads."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec


class Cell(msgspec.Struct, frozen=True):
    """One setting under which every server is measured."""

    streams: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.streams} stream{'s' if self.streams > 1 else ''}"


class Job(msgspec.Struct, frozen=True):
    """The work of one cell: `prompts`, of which `streams` run at a time, after a warm-up."""

    streams: int
    prompts: list[str]
    warm_up: list[str]
    max_tokens: int
    temperature: float
    top_p: float


class Endpoint(msgspec.Struct, frozen=True):
    """Where the client process sends a job."""

    host: str
    port: int
    model: str


class ClientTask(msgspec.Struct, frozen=True):
    """What the client process reads on its standard input."""

    endpoint: Endpoint
    job: Job


class Answer(msgspec.Struct, frozen=True):
    """One streamed answer; times are seconds since the first request of the job was sent."""

    sent: float
    arrivals: list[float]
    ended: float
    prompt_tokens: int
    completion_tokens: int


class Sample(msgspec.Struct, frozen=True):
    """One run of one job on one server. Times are in seconds.

    `tokens_per_s` counts completion tokens from the first request sent to the last byte received,
    prefill included. `short` counts the answers that ended before `max_tokens`.
    """

    tokens: int
    prompt_tokens: int
    short: int
    wall: float
    tokens_per_s: float
    decode_tokens_per_s: float
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    itl_p50: float | None = None
    itl_p99: float | None = None


class Measurement(msgspec.Struct, frozen=True):
    """A sample, and what it is a sample of."""

    server: str
    round: int
    cell: Cell
    sample: Sample


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


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def sample_of_answers(answers: Sequence[Answer], max_tokens: int) -> Sample:
    """The figures of one job from what its client saw."""
    silent = sum(not answer.arrivals for answer in answers)
    if silent:
        raise RuntimeError(f"{silent} of {len(answers)} answers had no text")
    tokens = sum(answer.completion_tokens for answer in answers)
    wall = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    ttft = [answer.arrivals[0] - answer.sent for answer in answers]
    gaps = [
        after - before
        for answer in answers
        for before, after in zip(answer.arrivals, answer.arrivals[1:], strict=False)
    ]
    return Sample(
        tokens=tokens,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        short=sum(answer.completion_tokens < max_tokens for answer in answers),
        wall=wall,
        tokens_per_s=tokens / wall,
        decode_tokens_per_s=_decode_rate(answers),
        ttft_p50=percentile(ttft, 0.5),
        ttft_p99=percentile(ttft, 0.99),
        itl_p50=percentile(gaps, 0.5) if gaps else None,
        itl_p99=percentile(gaps, 0.99) if gaps else None,
    )


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
