"""Drawing the tokens of all rows of a batch in one graph, without waiting for it."""

import math
from collections.abc import Container, Iterator
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_server.engine.protocol import Sampling

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Allowed

COLDEST = 2.0**-126
"""The lowest temperature float32 can divide by; below it counts as 0."""


class SampledRow(Protocol):
    @property
    def sampling(self) -> Sampling: ...

    @property
    def prompt(self) -> list[int]:
        """Without tokens that an earlier engine sampled."""

    @property
    def completion(self) -> list[int]:
        """Tokens that have been read back."""

    @property
    def in_flight(self) -> bool:
        """Whether the next input is not yet in `completion`."""

    @property
    def position(self) -> int:
        """Index of the token about to be drawn in the completion."""


def filters(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def penalises(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


class DeviceSampler:
    def __init__(self, rows: Many[SampledRow], inputs: mx.array, vocab_size: int) -> None:
        settings = [row.sampling for row in rows]
        self.settings = settings
        self.bias = _Bias.of(settings)
        self.penalties = _Penalties.of(rows, inputs, vocab_size)
        drawn = [i for i, s in enumerate(settings) if s.temperature >= COLDEST]
        self.plain = _Draw.of(settings, [i for i in drawn if not filters(settings[i])])
        self.filtered = _FilteredDraw.of(settings, [i for i in drawn if filters(settings[i])])

    def sample(
        self, logits: mx.array, shares: list[float], allowed: "Allowed | None" = None
    ) -> mx.array:
        """Tokens (rows,) uint32 from `logits` (rows, vocab) float32.

        Each is the allowed one at its share in [0, 1) of the row's cumulative distribution.
        """
        if allowed and allowed.rows:
            logits = _masked(logits, allowed)
        if self.bias:
            logits = self.bias.apply(logits)
        if self.penalties:
            logits = self.penalties.apply(logits)
        tokens = mx.argmax(logits, axis=-1).astype(mx.uint32)
        for draw in self._draws(allowed.forced if allowed else ()):
            tokens[draw.index] = draw.sample(logits, shares)
        if self.penalties:
            self.penalties.count(tokens)
        return tokens

    def _draws(self, forced: Container[int]) -> "Iterator[_Draw]":
        """A forced row's largest logit is its only one."""
        for draw in (self.plain, self.filtered):
            if draw is None:
                continue
            free = [i for i in draw.members if i not in forced]
            if len(free) == len(draw.members):
                yield draw
            elif free:
                yield type(draw)(self.settings, free)


def _masked(logits: mx.array, allowed: "Allowed") -> mx.array:
    index, words = mx.array(allowed.rows), mx.array(allowed.words)
    bits = (words[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    bits = bits.reshape(words.shape[0], -1)[:, : logits.shape[1]]
    masked = mx.array(logits)  # the caller still wants the unmodified ones
    masked[index] = mx.where(bits.astype(mx.bool_), logits[index], -mx.inf)
    return masked


class _Bias:
    def __init__(self, entries: list[tuple[int, int, float]]) -> None:
        rows, tokens, values = zip(*entries, strict=True)
        self.rows, self.tokens, self.values = mx.array(rows), mx.array(tokens), mx.array(values)

    @classmethod
    def of(cls, settings: list[Sampling]) -> "_Bias | None":
        entries = [
            (row, token, value)
            for row, sampling in enumerate(settings)
            for token, value in sampling.logit_bias.items()
        ]
        return cls(entries) if entries else None

    def apply(self, logits: mx.array) -> mx.array:
        return logits.at[self.rows, self.tokens].add(self.values)


class _Penalties:
    """`seen` (rows, vocab) are the prompt's tokens, `counts` (rows, vocab) the completion's.

    Repetition as in Keskar et al. 2019 (CTRL), presence and frequency as OpenAI defines them.
    """

    def __init__(
        self, rows: Many[SampledRow], index: list[int], inputs: mx.array, vocab_size: int
    ) -> None:
        self.index = mx.array(index)
        chosen = [rows[i] for i in index]
        settings = [row.sampling for row in chosen]
        self.repetition = mx.array([s.repetition_penalty for s in settings])[:, None]
        self.presence = mx.array([s.presence_penalty for s in settings])[:, None]
        self.frequency = mx.array([s.frequency_penalty for s in settings])[:, None]
        self.seen = _histogram([row.prompt for row in chosen], vocab_size) > 0
        self.counts = _histogram([row.completion for row in chosen], vocab_size)
        in_flight = mx.array([float(row.in_flight) for row in chosen])
        self._add(inputs[self.index], in_flight)

    @classmethod
    def of(cls, rows: Many[SampledRow], inputs: mx.array, vocab_size: int) -> "_Penalties | None":
        index = [i for i, row in enumerate(rows) if penalises(row.sampling)]
        return cls(rows, index, inputs, vocab_size) if index else None

    def apply(self, logits: mx.array) -> mx.array:
        mine = logits[self.index]
        used = self.counts > 0
        scaled = mx.where(mine > 0, mine / self.repetition, mine * self.repetition)
        mine = mx.where(self.seen | used, scaled, mine)
        mine = mine - self.frequency * self.counts - self.presence * used
        penalised = mx.array(logits)  # the caller still wants the unmodified ones
        penalised[self.index] = mine
        return penalised

    def count(self, tokens: mx.array) -> None:
        """Count the tokens (batch rows,) just drawn."""
        chosen = tokens[self.index]
        self._add(chosen, mx.ones(chosen.shape))

    def _add(self, tokens: mx.array, amounts: mx.array) -> None:
        rows = mx.arange(tokens.shape[0])
        self.counts = self.counts.at[rows, tokens].add(amounts)


def _histogram(token_lists: list[list[int]], vocab_size: int) -> mx.array:
    counts = mx.zeros((len(token_lists), vocab_size))
    rows = [mx.full(len(tokens), row) for row, tokens in enumerate(token_lists) if tokens]
    if not rows:
        return counts
    tokens = mx.concatenate([mx.array(tokens) for tokens in token_lists if tokens])
    return counts.at[mx.concatenate(rows), tokens].add(1.0)


class _Draw:
    """Rows with a temperature and no filter."""

    def __init__(self, settings: list[Sampling], index: list[int]) -> None:
        self.members = index
        self.index = mx.array(index)
        self.temperature = mx.array([settings[i].temperature for i in index])[:, None]

    @classmethod
    def of(cls, settings: list[Sampling], index: list[int]) -> "_Draw | None":
        return cls(settings, index) if index else None

    def sample(self, logits: mx.array, shares: list[float]) -> mx.array:
        """`logits` (rows, vocab) and `shares` are those of all rows."""
        probabilities = mx.softmax(logits[self.index] / self.temperature, axis=-1)
        return self._invert(probabilities, shares)

    def _invert(self, weights: mx.array, shares: list[float]) -> mx.array:
        """The first index whose cumulative weight exceeds its share: (rows,)."""
        mine = mx.array([shares[i] for i in self.members])
        cumulative = mx.cumsum(weights, axis=-1)
        target = mine[:, None] * cumulative[:, -1:]
        return mx.argmax((cumulative > target) & (weights > 0), axis=-1).astype(mx.uint32)


class _FilteredDraw(_Draw):
    """Rows cut by top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024), in that order.

    Each filter sees what the ones before it left, renormalised; the most likely token always
    stays. Of equally likely tokens the lowest comes first.
    """

    def __init__(self, settings: list[Sampling], index: list[int]) -> None:
        super().__init__(settings, index)
        mine = [settings[i] for i in index]
        unlimited = 2**31 - 1
        self.top_k = mx.array([s.top_k if s.top_k > 0 else unlimited for s in mine])[:, None]
        # A sum may round to less than what it adds up, so no share of it would leave all tokens.
        self.top_p = mx.array([s.top_p if s.top_p < 1 else math.inf for s in mine])[:, None]
        self.min_p = mx.array([s.min_p for s in mine])[:, None]

    @classmethod
    def of(cls, settings: list[Sampling], index: list[int]) -> "_FilteredDraw | None":
        return cls(settings, index) if index else None

    def sample(self, logits: mx.array, shares: list[float]) -> mx.array:
        scaled = logits[self.index] / self.temperature
        order = mx.argsort(-scaled, axis=-1)
        sorted_logits = mx.take_along_axis(scaled, order, axis=-1)
        weights = self._filter(mx.softmax(sorted_logits, axis=-1))
        rank = self._invert(weights, shares)
        return mx.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(mx.uint32)

    def _filter(self, weights: mx.array) -> mx.array:
        """Zero what is cut from `weights` (rows, vocab), in falling order."""
        rank = mx.arange(weights.shape[-1])[None]
        weights = mx.where(rank < self.top_k, weights, 0)
        before = mx.cumsum(weights, axis=-1) - weights
        kept = before < self.top_p * weights.sum(axis=-1, keepdims=True)
        kept &= weights >= self.min_p * weights[:, :1]
        return mx.where(kept | (rank == 0), weights, 0)


def token_logprobs(logits: mx.array, tokens: mx.array, most: int) -> tuple[mx.array, ...]:
    """See `sampler.token_logprobs`."""
    logits = logits.astype(mx.float32)
    normal = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1) - normal
    if most == 0:
        return (chosen[:, 0],)
    best = mx.argpartition(-logits, kth=min(most, logits.shape[-1]) - 1, axis=-1)[:, :most]
    values = mx.take_along_axis(logits, best, axis=-1) - normal
    order = mx.argsort(-values, axis=-1)
    return (
        chosen[:, 0],
        mx.take_along_axis(best, order, axis=-1),
        mx.take_along_axis(values, order, axis=-1),
    )
