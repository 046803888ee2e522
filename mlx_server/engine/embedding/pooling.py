"""A text's vector from those of its tokens; modes are named as in sentence-transformers."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_server.engine.protocol import PoolingMode

Pool = Callable[[mx.array, mx.array], mx.array]
"""(rows, width) from states (rows, tokens, width) and lengths (rows, 1)."""


def pool(states: mx.array, lengths: Sequence[int], modes: Sequence[PoolingMode]) -> mx.array:
    """Vectors (rows, width times modes) in float32 of `states` (rows, tokens, width).

    Row i has `lengths[i]` tokens; padding follows them.
    """
    states = states.astype(mx.float32)
    counts = mx.array(list(lengths))[:, None]
    pooled = [POOLS[mode](states, counts) for mode in modes]
    return pooled[0] if len(pooled) == 1 else mx.concatenate(pooled, axis=-1)


def _first(states: mx.array, lengths: mx.array) -> mx.array:
    return states[:, 0]


def _last(states: mx.array, lengths: mx.array) -> mx.array:
    return mx.take_along_axis(states, lengths[..., None] - 1, axis=1).squeeze(1)


def _max(states: mx.array, lengths: mx.array) -> mx.array:
    return mx.max(mx.where(_present(states, lengths), states, -mx.inf), axis=1)


def _sum(states: mx.array, lengths: mx.array) -> mx.array:
    # Not a product with 0 and 1: padding may hold NaN.
    return mx.sum(mx.where(_present(states, lengths), states, 0.0), axis=1)


def _mean(states: mx.array, lengths: mx.array) -> mx.array:
    return _sum(states, lengths) / lengths


def _mean_sqrt_len(states: mx.array, lengths: mx.array) -> mx.array:
    return _sum(states, lengths) / mx.sqrt(lengths)


def _weighted_mean(states: mx.array, lengths: mx.array) -> mx.array:
    """Later tokens weigh more: they have seen more of a decoder's text."""
    weights = mx.arange(1, states.shape[1] + 1)[:, None]
    return _sum(states * weights, lengths) / (lengths * (lengths + 1) / 2)


def _present(states: mx.array, lengths: mx.array) -> mx.array:
    return (mx.arange(states.shape[1]) < lengths)[..., None]


POOLS: dict[PoolingMode, Pool] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "weighted_mean": _weighted_mean,
    "last": _last,
}
