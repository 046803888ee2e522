"""Sampling draws from exactly the distribution that the formulas describe."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.engine.protocol import Sampling
from mlx_server.engine.sampling import BatchSampler, token_logprobs, uniform

VOCAB = 97


@dataclass
class RowState:
    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    completion: list[int] = field(default_factory=list)
    in_flight: bool = False
    position: int = 0


def reference(logits: np.ndarray, row: RowState) -> np.ndarray:
    """The probabilities (vocab,) that the next token has, by the textbook, in float64."""
    s = row.sampling
    logits = logits.astype(np.float64).copy()
    for token, bias in s.logit_bias.items():
        logits[token] += bias
    counts = np.bincount(row.completion, minlength=VOCAB)
    seen = (np.bincount(row.prompt, minlength=VOCAB) > 0) | (counts > 0)
    penalised = np.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
    logits = np.where(seen, penalised, logits)
    logits -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    if s.temperature == 0:
        return np.eye(VOCAB)[logits.argmax()]
    p = np.exp((logits - logits.max()) / s.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    q = p[order]
    if s.top_k:
        q[s.top_k :] = 0
    q /= q.sum()
    if s.top_p < 1:
        q[1:][np.cumsum(q)[:-1] >= s.top_p] = 0
    q[q < s.min_p * q[0]] = 0
    out = np.zeros(VOCAB)
    out[order] = q / q.sum()
    return out


SETTINGS = [
    Sampling(temperature=0),
    Sampling(temperature=1),
    Sampling(temperature=0.5),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1, top_k=5),
    Sampling(temperature=1, top_k=1),
    Sampling(temperature=1.3, min_p=0.1),
    Sampling(temperature=1, top_k=20, top_p=0.6, min_p=0.05),
    Sampling(temperature=1, top_p=0.0),
    Sampling(temperature=1, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3),
    Sampling(temperature=0, logit_bias={3: 100.0}),
    Sampling(temperature=0.8, logit_bias={5: 4.0, 6: -100.0}, top_p=0.8, frequency_penalty=-1.0),
]


def test_a_mixed_batch_draws_every_row_from_its_own_reference_distribution() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(len(SETTINGS), VOCAB)).astype(np.float32) * 3
    rows = [RowState(s, prompt=[1, 2, 3, 3], completion=[4, 4, 9]) for s in SETTINGS]
    draws = 4000
    counts = np.zeros((len(rows), VOCAB))
    sampler = BatchSampler(rows, mx.zeros(len(rows), dtype=mx.uint32), VOCAB)
    for position in range(draws):
        for row in rows:
            row.position = position
        if sampler.penalties:  # each draw is made from the same state
            sampler = BatchSampler(rows, mx.zeros(len(rows), dtype=mx.uint32), VOCAB)
        tokens = np.array(sampler.sample(mx.array(logits)))
        counts[np.arange(len(rows)), tokens] += 1
    for row, observed, given in zip(rows, counts, logits, strict=True):
        expected = reference(given, row) * draws
        assert observed[expected == 0].sum() == 0, f"a token was drawn that {row.sampling} excludes"
        likely = expected >= 5
        chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
        freedom = max(1, likely.sum() - 1)
        assert chi_square < freedom + 6 * np.sqrt(2 * freedom), row.sampling


def test_a_token_still_on_the_device_counts_for_penalties() -> None:
    sampling = Sampling(temperature=0, presence_penalty=2.0)
    logits = mx.zeros((1, VOCAB)).at[0, 7].add(1.0)
    without = RowState(sampling)
    assert BatchSampler([without], mx.array([7]), VOCAB).sample(logits).item() == 7
    in_flight = RowState(sampling, in_flight=True)
    assert BatchSampler([in_flight], mx.array([7]), VOCAB).sample(logits).item() != 7


def test_penalties_count_the_tokens_drawn_since() -> None:
    row = RowState(Sampling(temperature=0, presence_penalty=2.0))
    logits = mx.zeros((1, VOCAB)).at[0, 7].add(1.0)
    sampler = BatchSampler([row], mx.array([0]), VOCAB)
    assert sampler.sample(logits).item() == 7
    assert sampler.sample(logits).item() != 7


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    assert uniform(5, 3) == uniform(5, 3)
    values = np.array([uniform(seed, i) for seed in range(50) for i in range(200)])
    assert len(set(values)) > 9_900
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


@pytest.mark.parametrize("most", [0, 1, 5, VOCAB])
def test_log_probabilities_are_those_of_the_unmodified_distribution(most: int) -> None:
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    read = token_logprobs(mx.array(logits), mx.array([4, 5, 6]), most)
    assert np.allclose(np.array(read[0]), expected[[0, 1, 2], [4, 5, 6]], atol=1e-5)
    if most:
        assert np.allclose(np.array(read[2]), -np.sort(-expected)[:, :most], atol=1e-5)
        assert (np.array(read[1])[:, 0] == expected.argmax(axis=-1)).all()
