"""Time to draw a batch's next tokens, beside mlx-lm's samplers applied row by row as it does.

    python -m benchmarks.sampling [--vocab 49152] [--rows 8 16 32] [--repeats 15]

Logits follow Zipf's law. Both are timed in turns on the default device.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_server.engine.protocol import Sampling
from mlx_server.engine.sampling.sampler import BatchSampler

ZIPF_EXPONENT = 1.5
SEEN_TOKENS = 500
"""Tokens of prompt and completion, half and half."""

Step = Callable[[mx.array], mx.array]


@dataclass
class Row:
    """A request in mid-completion."""

    sampling: Sampling
    prompt: list[int] = field(default_factory=lambda: list(range(SEEN_TOKENS // 2)))
    completion: list[int] = field(default_factory=lambda: list(range(SEEN_TOKENS // 2)))
    in_flight: bool = False
    position: int = 0


def equal(sampling: Sampling) -> Callable[[int], Sampling]:
    """The same settings for every row."""
    return lambda row: sampling


def different(row: int) -> Sampling:
    """Settings that no other row has."""
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.5 + row / 50, top_p=0.8 + row / 200),
        Sampling(temperature=0.7, top_k=20 + row),
        Sampling(temperature=1.0, min_p=0.02 + row / 500),
        Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1 + row / 100),
        Sampling(temperature=0.9, logit_bias={row: 1.0, 100: -5.0}),
        Sampling(temperature=1.0 + row / 100),
        Sampling(temperature=0.0, presence_penalty=0.3 + row / 100),
    ]
    return kinds[row % len(kinds)]


CASES: dict[str, Callable[[int], Sampling]] = {
    "greedy": equal(Sampling(temperature=0.0)),
    "T 1": equal(Sampling(temperature=1.0)),
    "T 0.7, top-p 0.9": equal(Sampling(temperature=0.7, top_p=0.9)),
    "T 2, top-p 0.95": equal(Sampling(temperature=2.0, top_p=0.95)),
    "T 0.7, top-k 40": equal(Sampling(temperature=0.7, top_k=40)),
    "T 0.7, min-p 0.05": equal(Sampling(temperature=0.7, min_p=0.05)),
    "penalties": equal(Sampling(temperature=0.7, repetition_penalty=1.1, frequency_penalty=0.1)),
    "all different": different,
}


def ours(settings: list[Sampling], vocab: int) -> Step:
    """A step of mlx-server."""
    rows = [Row(sampling) for sampling in settings]
    sampler = BatchSampler(rows, mx.zeros(len(rows), dtype=mx.uint32), vocab)

    def step(logits: mx.array) -> mx.array:
        for row in rows:
            row.position += 1
        draw = sampler.launch(logits)
        draw.finish()
        return draw.tokens

    return step


def theirs(settings: list[Sampling]) -> Step:
    """A step of mlx-lm's batch generator, every request with a sampler of its own."""
    samplers = [make_sampler(s.temperature, s.top_p, s.min_p, top_k=s.top_k) for s in settings]
    processors = [
        make_logits_processors(
            s.logit_bias,
            s.repetition_penalty if s.repetition_penalty != 1 else None,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
        )
        for s in settings
    ]
    seen = mx.array(Row(Sampling()).prompt + Row(Sampling()).completion)

    def step(logits: mx.array) -> mx.array:
        rows = [logits[i : i + 1] for i in range(len(samplers))]
        if any(processors):
            for i, row_processors in enumerate(processors):
                for process in row_processors:
                    rows[i] = process(seen, rows[i])
            logits = mx.concatenate(rows)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if all(sampler is samplers[0] for sampler in samplers):
            return mx.array(samplers[0](logprobs))
        drawn = [sampler(logprobs[i : i + 1]) for i, sampler in enumerate(samplers)]
        return mx.concatenate(drawn)

    return step


def measure(steps: list[Step], logits: mx.array, repeats: int) -> list[float]:
    """Median seconds of each step, taken in turns after one that is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for step, taken in zip(steps, times, strict=True):
            mx.synchronize()
            started = time.perf_counter()
            mx.eval(step(logits))
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in times]


def zipf_logits(rows: int, vocab: int) -> mx.array:
    """Logits (rows, vocab) float32, the likeliest tokens anywhere in the vocabulary."""
    ranks = mx.argsort(mx.random.uniform(shape=(rows, vocab)), axis=-1) + 1
    return -ZIPF_EXPONENT * mx.log(ranks)


def main() -> None:
    """Print one line for each kind of sampling and size of batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"{'sampling':<20} {'rows':>4} {'mlx-server ms':>14} {'mlx-lm ms':>10} {'ratio':>6}")
    for rows in options.rows:
        logits = zipf_logits(rows, options.vocab)
        mx.eval(logits)
        for name, settings_of in CASES.items():
            settings = [settings_of(row) for row in range(rows)]
            steps = [ours(settings, options.vocab), theirs(settings)]
            mine, other = measure(steps, logits, options.repeats)
            ratio = other / mine
            print(f"{name:<20} {rows:4} {mine * 1e3:14.2f} {other * 1e3:10.2f} {ratio:6.1f}")


if __name__ == "__main__":
    main()
