"""Sampling draws from exactly the distribution that the formulas describe, on either side."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.engine.protocol import Sampling
from mlx_server.engine.sampling import graph as device_sampling
from mlx_server.engine.sampling.graph import DeviceSampler
from mlx_server.engine.sampling.host import HostSampler
from mlx_server.engine.sampling.sampler import BatchSampler, token_logprobs, uniform

VOCAB = 97
Sampler = DeviceSampler | HostSampler
Shaped = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
both = pytest.mark.parametrize("kind", [DeviceSampler, HostSampler])


@dataclass
class RowState:
    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    completion: list[int] = field(default_factory=list)
    in_flight: bool = False
    position: int = 0


def new(kind: type[Sampler], rows: list[RowState], vocab: int, inputs: int = 0) -> Sampler:
    return kind(rows, mx.full(len(rows), inputs, dtype=mx.uint32), vocab)


def draw(sampler: Sampler, logits: np.ndarray, shares: list[float]) -> list[int]:
    if isinstance(sampler, DeviceSampler):
        tokens = sampler.sample(mx.array(logits), shares)
    else:
        tokens = mx.array([0] * len(shares), dtype=mx.uint32)
        sampler.sample(mx.array(logits), shares, tokens)
    return cast(list[int], tokens.tolist())


class Reference:
    """The next token's distribution by the textbook, in float64, laid out as a draw inverts it.

    `cut_is_close` tells that rounding may decide whether one more token passes a filter.
    """

    def __init__(self, logits: np.ndarray, row: RowState) -> None:
        s, vocab = row.sampling, len(logits)
        logits = self._adjusted(logits.astype(np.float64), row)
        self.cut_is_close = False
        if s.temperature == 0:
            self.order, self.weights = np.array([logits.argmax()]), np.ones(1)
            return
        weights = np.exp((logits - logits.max()) / s.temperature)
        filtered = s.top_k > 0 or s.top_p < 1 or s.min_p > 0
        self.order = np.argsort(-weights, kind="stable") if filtered else np.arange(vocab)
        self.weights = self._filtered(weights[self.order] / weights.sum(), s)

    @staticmethod
    def _adjusted(logits: np.ndarray, row: RowState) -> np.ndarray:
        s = row.sampling
        for token, bias in s.logit_bias.items():
            logits[token] += bias
        counts = np.bincount(np.array(row.completion, dtype=int), minlength=len(logits))
        seen = np.bincount(np.array(row.prompt, dtype=int), minlength=len(logits)) + counts > 0
        scaled = np.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
        logits = np.where(seen, scaled, logits)
        logits -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
        return logits

    def _filtered(self, weights: np.ndarray, s: Sampling) -> np.ndarray:
        if s.top_k:
            weights[s.top_k :] = 0
        kept = np.ones(len(weights), dtype=bool)
        if s.top_p < 1:
            before, mass = weights.cumsum() - weights, s.top_p * weights.sum()
            kept &= before < mass
            self.cut_is_close |= bool((abs(before[1:] - mass) < 1e-5).any())
        if s.min_p > 0:
            kept &= weights >= s.min_p * weights[0]
            near = abs(weights / weights[0] - s.min_p) < 1e-5
            self.cut_is_close |= bool(near.any()) and s.min_p < 1
        kept[0] |= s.top_k > 0 or s.top_p < 1 or s.min_p > 0
        return weights * kept

    def probabilities(self, vocab: int) -> np.ndarray:
        """(vocab,)"""
        out = np.zeros(vocab)
        out[self.order] = self.weights / self.weights.sum()
        return out

    def allows(self, token: int, share: float, tolerance: float) -> bool:
        """Whether the draw at `share` is `token`, give or take `tolerance` of the mass."""
        rank = int(np.flatnonzero(self.order == token)[0])
        cumulative = self.weights.cumsum() / self.weights.sum()
        low = cumulative[rank - 1] if rank else 0.0
        inside = low - tolerance <= share < cumulative[rank] + tolerance
        return bool(inside and self.weights[rank] > 0)


SETTINGS = [
    Sampling(temperature=0),
    Sampling(temperature=1),
    Sampling(temperature=0.5),
    Sampling(temperature=2),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=2, top_p=0.95),
    Sampling(temperature=1, top_p=0.999),
    Sampling(temperature=1, top_k=5),
    Sampling(temperature=1, top_k=1),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=0.02, top_k=40),
    Sampling(temperature=1, top_k=3_000, top_p=0.9),
    Sampling(temperature=1, top_k=10**9, min_p=0.01),
    Sampling(temperature=1.3, min_p=0.1),
    Sampling(temperature=1, min_p=1.0),
    Sampling(temperature=1, top_k=20, top_p=0.6, min_p=0.05),
    Sampling(temperature=1, top_p=0.0),
    Sampling(temperature=1, top_p=1e-6),
    Sampling(temperature=1, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3),
    Sampling(temperature=0, repetition_penalty=2.0, presence_penalty=1.5),
    Sampling(temperature=0, logit_bias={3: 100.0}),
    Sampling(temperature=0.8, logit_bias={5: 4.0, 6: -100.0}, top_p=0.8, frequency_penalty=-1.0),
    Sampling(temperature=1, logit_bias={0: float("-inf"), 2: float("-inf")}, min_p=0.001),
]


def peaked(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.normal(size=shape) * 4


def flat(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.normal(size=shape) * 0.05


def tied(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.integers(-6, 7, size=shape)


@both
@pytest.mark.parametrize("shape_of", [peaked, flat, tied])
@pytest.mark.parametrize("vocab", [7, VOCAB, 6_001])
def test_every_draw_is_the_one_that_the_reference_distribution_gives(
    kind: type[Sampler], shape_of: Shaped, vocab: int
) -> None:
    generator = np.random.default_rng(vocab)
    prompt, completion = [1, 2, 3, 3], [4, 4, 6]
    rows = [RowState(s, prompt, completion) for s in SETTINGS]
    compared = 0
    for round_ in range(12):
        logits = shape_of(generator, (len(rows), vocab)).astype(np.float32)
        references = [Reference(given, row) for given, row in zip(logits, rows, strict=True)]
        shares = [uniform(round_, i) for i in range(len(rows))]
        tokens = draw(new(kind, rows, vocab), logits, shares)
        for row, reference, token, share in zip(rows, references, tokens, shares, strict=True):
            if not reference.cut_is_close:
                assert reference.allows(token, share, 2e-5), (row.sampling, token, share)
                compared += 1
    assert compared > 150


@both
def test_frequencies_follow_the_reference_distribution(kind: type[Sampler]) -> None:
    generator = np.random.default_rng(0)
    rows = [RowState(s, prompt=[1, 2, 3, 3], completion=[4, 4, 9]) for s in SETTINGS]
    logits = peaked(generator, (len(rows), VOCAB)).astype(np.float32)
    draws = 2000
    counts = np.zeros((len(rows), VOCAB))
    for position in range(draws):
        sampler = new(kind, rows, VOCAB)  # each draw is made from the same state
        shares = [uniform(i, position) for i in range(len(rows))]
        counts[np.arange(len(rows)), draw(sampler, logits, shares)] += 1
    for row, observed, given in zip(rows, counts, logits, strict=True):
        expected = Reference(given, row).probabilities(VOCAB) * draws
        assert observed[expected == 0].sum() == 0, f"a token was drawn that {row.sampling} excludes"
        likely = expected >= 5
        chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
        freedom = max(1, likely.sum() - 1)
        assert chi_square < freedom + 6 * np.sqrt(2 * freedom), row.sampling


@both
@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_p=0.5), 49),
        (Sampling(top_k=10), 10),
        (Sampling(min_p=1.0), VOCAB),
        (Sampling(top_p=0.0), 1),
    ],
)
def test_of_equally_likely_tokens_a_cut_keeps_the_lowest(
    kind: type[Sampler], sampling: Sampling, kept: int
) -> None:
    shares = [(token + 0.5) / kept for token in range(kept)]
    rows = [RowState(sampling) for _ in shares]
    logits = np.zeros((kept, VOCAB), dtype=np.float32)
    assert draw(new(kind, rows, VOCAB), logits, shares) == list(range(kept))


@both
def test_a_row_draws_the_same_alone_as_among_others(kind: type[Sampler]) -> None:
    logits = peaked(np.random.default_rng(3), (len(SETTINGS), 5_000)).astype(np.float32)
    rows = [RowState(s, prompt=[1, 2], completion=[4], in_flight=True) for s in SETTINGS]
    shares = [uniform(9, i) for i in range(len(rows))]
    together = draw(new(kind, rows, 5_000, inputs=7), logits, shares)
    alone = [
        draw(new(kind, [row], 5_000, inputs=7), logits[i : i + 1], [shares[i]])[0]
        for i, row in enumerate(rows)
    ]
    assert together == alone


@both
def test_logits_without_a_distribution_still_give_a_token(kind: type[Sampler]) -> None:
    logits = np.zeros((3, VOCAB), dtype=np.float32)
    logits[0], logits[1], logits[2, 5] = np.nan, -np.inf, np.inf
    for sampling in SETTINGS:
        rows = [RowState(sampling)] * 3
        for token in draw(new(kind, rows, VOCAB), logits, [0.5] * 3):
            assert 0 <= token < VOCAB


@both
def test_a_temperature_too_low_for_float32_takes_the_likeliest(kind: type[Sampler]) -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, 7] = 1.0
    for more in ({}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 3}):
        cold = RowState(Sampling(temperature=1e-46, **more))
        assert draw(new(kind, [cold], VOCAB), logits, [0.5]) == [7]


@both
def test_a_token_still_on_the_device_counts_for_penalties(kind: type[Sampler]) -> None:
    sampling = Sampling(temperature=0, presence_penalty=2.0)
    logits = np.eye(VOCAB, dtype=np.float32)[7:8]
    assert draw(new(kind, [RowState(sampling)], VOCAB, inputs=7), logits, [0.0]) == [7]
    in_flight = RowState(sampling, in_flight=True)
    assert draw(new(kind, [in_flight], VOCAB, inputs=7), logits, [0.0]) != [7]


@both
def test_penalties_count_the_tokens_drawn_since(kind: type[Sampler]) -> None:
    row = RowState(Sampling(temperature=0, frequency_penalty=0.6))
    logits = np.eye(VOCAB, dtype=np.float32)[7:8]
    sampler = new(kind, [row], VOCAB)
    drawn = [draw(sampler, logits, [0.0])[0] for _ in range(3)]
    assert drawn[:2] == [7, 7]
    assert drawn[2] != 7


def finished(sampler: BatchSampler, logits: mx.array) -> mx.array:
    draw = sampler.launch(logits)
    draw.finish()
    return draw.tokens


def test_the_next_steps_graph_may_be_built_before_the_tokens_are_drawn() -> None:
    rows = [RowState(Sampling(temperature=1, frequency_penalty=0.5, seed=i)) for i in range(3)]
    logits = mx.array(peaked(np.random.default_rng(4), (3, VOCAB)).astype(np.float32))
    sampler = BatchSampler(rows, mx.zeros(3, dtype=mx.uint32), VOCAB, logprobs=[2, None, 0])
    first = sampler.launch(logits)
    first.start()
    built_upon = first.tokens * 2
    for row in rows:
        row.position, row.in_flight = 1, True
    # The membership of a batch may change while a token is in flight, and so its sampler.
    second = BatchSampler(rows, first.tokens, VOCAB).launch(logits + built_upon[:, None])
    first.finish()
    second.start()
    again = BatchSampler(
        [RowState(row.sampling) for row in rows], mx.zeros(3, dtype=mx.uint32), VOCAB
    )
    expected = finished(again, logits)
    assert first.tokens.tolist() == expected.tolist()
    assert built_upon.tolist() == (expected * 2).tolist()
    logprobs = first.logprobs()
    assert logprobs is not None
    assert logprobs[1].shape == (2, 2)
    second.finish()
    for row, token in zip(rows, cast(list[int], expected.tolist()), strict=True):
        row.completion, row.in_flight = [token], False
    known = finished(BatchSampler(rows, expected, VOCAB), logits + built_upon[:, None])
    assert second.tokens.tolist() == known.tolist()


def test_greedy_rows_do_not_wait_for_the_logits() -> None:
    rows = [RowState(Sampling(temperature=0))]
    never_computed = mx.zeros((1, VOCAB))
    token = finished(BatchSampler(rows, mx.array([0]), VOCAB), never_computed)
    assert token.dtype == mx.uint32
    assert token.item() == 0


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    assert uniform(5, 3) == uniform(5, 3)
    values = np.array([uniform(seed, i) for seed in range(50) for i in range(200)])
    assert len(set(values)) > 9_900
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


@pytest.mark.parametrize("read", [token_logprobs, device_sampling.token_logprobs])
@pytest.mark.parametrize("most", [0, 1, 5, VOCAB])
def test_log_probabilities_are_those_of_the_unmodified_distribution(
    read: Callable[..., tuple[mx.array, ...]], most: int
) -> None:
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    arrays = read(mx.array(logits), mx.array([4, 5, 6]), most)
    assert np.allclose(np.array(arrays[0]), expected[[0, 1, 2], [4, 5, 6]], atol=1e-5)
    if most:
        assert np.allclose(np.array(arrays[2]), -np.sort(-expected)[:, :most], atol=1e-5)
        assert (np.array(arrays[1])[:, 0] == expected.argmax(axis=-1)).all()


def test_reading_log_probabilities_leaves_the_logits_to_be_penalised_alone() -> None:
    row = RowState(Sampling(temperature=1, logit_bias={3: 50.0}, repetition_penalty=1.5), [1, 2])
    given = peaked(np.random.default_rng(2), (1, VOCAB)).astype(np.float32)
    logits = mx.array(given)
    assert finished(BatchSampler([row], mx.array([0]), VOCAB), logits).item() == 3
    assert (np.array(logits) == given).all()
