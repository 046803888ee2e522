"""`sampling.graph` in NumPy, for the CPU device, whose logits the host reads where they are.

NumPy's `exp` is some 20 times as fast there, and only tokens that a filter may keep are sorted.
"""

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_server.engine.protocol import Sampling
from mlx_server.engine.sampling.graph import COLDEST, SampledRow, filters, penalises

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Allowed

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

BLOCK = 256
"""Weights per entry of the coarse level of a cumulative distribution."""
GROUPS = 1024
"""Strided groups of a row whose maxima bound its largest values from below."""
FEW = 256
LARGEST_STEP, SMALLEST_STEP = 64.0, 1.1
ROUNDING = 1 + 1e-4
"""A generous bound on the error of a float32 sum over a vocabulary."""
LOWEST = np.float32(-np.inf)
LEAST_WEIGHT = np.nextafter(np.float32(0), np.float32(1))


class HostSampler:
    def __init__(self, rows: Many[SampledRow], inputs: mx.array, vocab_size: int) -> None:
        self.rows = [RowSampler(r.sampling, r.prompt, r.completion, vocab_size) for r in rows]
        self._vocab_size = vocab_size
        self._in_flight = [i for i, row in enumerate(rows) if row.in_flight]
        self._inputs = inputs

    def sample(
        self,
        logits: mx.array,
        shares: list[float],
        tokens: mx.array,
        allowed: "Allowed | None" = None,
    ) -> None:
        """As `DeviceSampler.sample`, but waits for the logits and writes to `tokens` (rows,)."""
        choices = allowed.choices(self._vocab_size) if allowed else {}
        values = np.asarray(logits)
        if self._in_flight:
            self._count(np.asarray(self._inputs))
        drawn = np.array(tokens, copy=False)
        for i, (row, share) in enumerate(zip(self.rows, shares, strict=True)):
            drawn[i] = row.draw(values[i], share, choices.get(i))
            row.count(int(drawn[i]))

    def _count(self, inputs: npt.NDArray[np.uint32]) -> None:
        for i in self._in_flight:
            self.rows[i].count(int(inputs[i]))
        self._in_flight = []


class RowSampler:
    def __init__(
        self, sampling: Sampling, prompt: list[int], completion: list[int], vocab_size: int
    ) -> None:
        self.sampling = sampling
        self.biased = np.array(list(sampling.logit_bias), dtype=np.intp)
        self.bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self.penalties = (
            _Penalties(sampling, prompt, completion, vocab_size) if penalises(sampling) else None
        )

    def draw(self, logits: Floats, share: float, choice: Ids | None = None) -> int:
        """The token at `share` of the distribution of `logits` (vocab,).

        Only tokens of `choice`, in rising order, take part.
        """
        if choice is None:
            return self._pick(self._adjusted(logits), share)
        if len(choice) == 1:
            return int(choice[0])
        return int(choice[self._pick(self._adjusted(logits)[choice], share)])

    def _pick(self, logits: Floats, share: float) -> int:
        best = int(logits.argmax())
        # Infinite or undefined logits, as a broken model gives them, have no distribution.
        if self.sampling.temperature < COLDEST or not np.isfinite(logits[best]):
            return best
        weights = _weights(logits, logits[best], self.sampling.temperature)
        if not filters(self.sampling):
            return _invert(weights, share)
        tokens, cumulative = _filter(weights, self.sampling)
        return int(tokens[_first_above(cumulative, share * cumulative[-1])])

    def count(self, token: int) -> None:
        if self.penalties:
            self.penalties.count(token)

    def _adjusted(self, logits: Floats) -> Floats:
        if self.penalties is None and not len(self.biased):
            return logits
        logits = logits.copy()
        logits[self.biased] += self.bias
        if self.penalties:
            self.penalties.apply(logits)
        return logits


class _Penalties:
    """As `graph._Penalties`; `used` are the tokens of both, `counts` (vocab,) the completion's."""

    def __init__(
        self, sampling: Sampling, prompt: list[int], completion: list[int], vocab_size: int
    ) -> None:
        self.repetition = np.float32(sampling.repetition_penalty)
        self.presence = np.float32(sampling.presence_penalty)
        self.frequency = np.float32(sampling.frequency_penalty)
        used = np.zeros(vocab_size, dtype=np.bool_)
        used[prompt + completion] = True
        self.used = np.flatnonzero(used)
        self.counts = np.zeros(vocab_size, dtype=np.float32)
        np.add.at(self.counts, np.array(completion, dtype=np.intp), 1)

    def apply(self, logits: Floats) -> None:
        mine, counts = logits[self.used], self.counts[self.used]
        mine = np.where(mine > 0, mine / self.repetition, mine * self.repetition)
        logits[self.used] = mine - self.frequency * counts - self.presence * (counts > 0)

    def count(self, token: int) -> None:
        if self.counts[token] == 0 and token not in self.used:
            self.used = np.append(self.used, token)
        self.counts[token] += 1


def token_logprobs(
    logits: mx.array, tokens: mx.array, most: int, index: mx.array
) -> tuple[mx.array, ...]:
    """See `sampler.token_logprobs`, of the rows at `index`."""
    values, drawn = np.asarray(logits.astype(mx.float32)), np.asarray(tokens)
    rows = [_row_logprobs(values[i], int(drawn[i]), most) for i in np.asarray(index)]
    chosen, best, best_logprobs = (np.stack(part) for part in zip(*rows, strict=True))
    if most == 0:
        return (mx.array(chosen),)
    return mx.array(chosen), mx.array(best.astype(np.uint32)), mx.array(best_logprobs)


def _row_logprobs(logits: Floats, token: int, most: int) -> tuple[np.float32, Ids, Floats]:
    """Of `token`, then the best `most` tokens, in falling order, and theirs."""
    highest = logits.max()
    normal = highest + np.log(_weights(logits, highest, 1.0).sum())
    best = largest(logits, most) if most else np.empty(0, dtype=np.intp)
    return logits[token] - normal, best, logits[best] - normal


def largest(values: Floats, count: int, floor: np.float32 = LOWEST) -> Ids:
    """Indices of the `count` largest of `values` (vocab,) from `floor` on, in falling order."""
    if count < len(values):
        floor = max(floor, _bound(values, count))
    near = np.flatnonzero(~(values < floor))  # undefined ones too: as many as asked for
    return near[_falling(values[near])[:count]]


def _bound(values: Floats, count: int) -> np.float32:
    """A close lower bound of the `count`-th largest value, when `count` is small.

    The `count` groups with the largest maxima each hold a value that reaches it.
    """
    if count <= GROUPS // 4 and len(values) >= 4 * GROUPS:
        whole = len(values) - len(values) % GROUPS
        values = values[:whole].reshape(-1, GROUPS).max(axis=0)
    return np.float32(np.partition(values, -count)[-count])


def _falling(values: Floats) -> Ids:
    """Stable indices of `values` in falling order.

    A float's bits order as its value does once those of one sign are flipped, and NumPy sorts
    16-bit keys by radix, four times as fast as comparing.
    """
    bits = (values + np.float32(0)).view(np.uint32)  # no negative zeros
    keys = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]


def _weights(logits: Floats, most: np.float32, temperature: float) -> Floats:
    weights = logits - most
    if temperature != 1:
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def _invert(weights: Floats, share: float) -> int:
    """The first index at which the cumulative weight exceeds `share` of the total.

    In two levels: a running sum over a whole vocabulary takes several times as long.
    """
    starts = np.arange(0, len(weights), BLOCK)
    sums = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
    target = share * sums[-1]
    block = _first_above(sums, target)
    if block:
        target -= sums[block - 1]
    inside = weights[starts[block] : starts[block] + BLOCK].cumsum(dtype=np.float64)
    return int(starts[block]) + _first_above(inside, target)


def _first_above(cumulative: npt.NDArray[np.float64], target: float) -> int:
    """If rounding leaves none above `target`, the last that adds to the sum."""
    last = np.searchsorted(cumulative, cumulative[-1])
    return int(min(np.searchsorted(cumulative, target, side="right"), last, len(cumulative) - 1))


def _filter(weights: Floats, sampling: Sampling) -> tuple[Ids, npt.NDArray[np.float64]]:
    """Tokens left by `graph._FilteredDraw`'s filters, in falling order, and cumulative weights."""
    if 0 < sampling.top_k < len(weights):
        tokens = largest(weights, sampling.top_k, LEAST_WEIGHT)
        total = float(weights[tokens].sum(dtype=np.float64))
    else:
        total = float(weights.sum())
        near = _candidates(weights, total, sampling)
        tokens = near[_falling(weights[near])]
    falling = weights[tokens]
    cumulative = falling.cumsum(dtype=np.float64)
    staying = falling >= np.float32(sampling.min_p)
    if sampling.top_p < 1:
        staying &= cumulative - falling < sampling.top_p * total
    count = max(1, np.count_nonzero(staying))
    return tokens[:count], cumulative[:count]


def _candidates(weights: Floats, total: float, sampling: Sampling) -> Ids:
    """A small superset, in rising order, of the tokens that top-p and min-p leave.

    Tokens below `rest / vocab`, with `rest` the mass that top-p may cut, have less than `rest`
    together. From there the floor rises in shrinking steps while the rest still holds the nucleus.
    """
    floor = max(np.float32(sampling.min_p), LEAST_WEIGHT)
    if sampling.top_p >= 1:
        return np.flatnonzero(weights >= floor)
    mass = sampling.top_p * total
    floor = max(floor, min(np.float32((total - mass) / len(weights)), np.float32(1)))
    tokens = np.flatnonzero(weights >= floor)
    near, step = weights[tokens], np.float32(LARGEST_STEP)
    while len(near) > FEW and step > SMALLEST_STEP:
        above = near >= floor * step
        if (near * above).sum() <= mass * ROUNDING:
            step = np.sqrt(step)
            continue
        floor, kept = floor * step, np.flatnonzero(above)
        tokens, near = tokens[kept], near[kept]
    return tokens
