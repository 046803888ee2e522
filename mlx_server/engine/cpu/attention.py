"""Attention in float32 for MLX's CPU device.

MLX computes exponentials one by one. While a prompt is computed the host is idle, so softmax runs
in NumPy on MLX's own memory. A decode step stays a lazy graph.
"""

from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_server.engine.cpu.activations import LAZY, exp, view

Floats = NDArray[np.float32]

MASKED = -1e30
"""Added to a masked score; finite, so that a row without keys gives no NaN."""
TILE = 1 << 19
"""Scores computed at once: 2 MB stay in the cache."""

_attention = mx.fast.scaled_dot_product_attention


def clear_masks() -> None:
    _additive.cache_clear()


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **rest: Any,
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`: (batch, heads, tokens, value dim).

    `q` is (batch, heads, tokens, head_dim), `k` and `v` (batch, kv heads, keys, ...).
    """
    tokens, keys = q.shape[2], k.shape[2]
    ours = q.dtype == k.dtype == v.dtype == mx.float32 and sinks is None and not rest
    if isinstance(mask, mx.array):
        known = mask.dtype in (mx.bool_, mx.float32)
    else:
        known = mask in (None, "causal")
    if not (ours and known) or not 0 < tokens <= keys:
        return _attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **rest)
    q = (q * scale).reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    out = _decode(q, k, v, mask) if tokens == 1 else _prefill(q, k, v, mask)
    return out.reshape(q.shape[0], -1, tokens, v.shape[-1])


def _decode(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """One token a row; `q` (batch, kv heads, group, 1, head_dim) is scaled."""
    # Products with one row read the keys as they lie; with several BLAS copies them first.
    scores = (q @ mx.expand_dims(k, 2).swapaxes(-1, -2)).squeeze(3)
    if isinstance(mask, mx.array):
        scores = scores + _by_group(_additive(mask), scores.shape[1]).squeeze(-2)
    if scores.size < LAZY:
        return mx.softmax(scores, axis=-1) @ v
    weights = exp(scores - mx.max(scores, axis=-1, keepdims=True))
    return (weights @ v) / mx.sum(weights, axis=-1, keepdims=True)


def _prefill(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """Tiles of queries; `q` (batch, kv heads, group, tokens, head_dim) is scaled."""
    tokens, keys = q.shape[3], k.shape[2]
    rows = max(16, TILE // (q.size // q.shape[-1] // tokens * keys))
    bias = None
    if isinstance(mask, mx.array):
        bias = _by_group(mask, q.shape[1])
        bias = mx.broadcast_to(bias, (*bias.shape[:-2], tokens, keys))
    done: list[mx.array] = []
    for start in range(0, tokens, rows):
        tile = q[..., start : start + rows, :]
        end = keys - tokens + start + tile.shape[3] if mask == "causal" else keys
        scores = tile.flatten(2, 3) @ k[:, :, :end].swapaxes(-1, -2)
        mx.eval(scores, bias, *done[-1:])
        scored = view(scores).reshape(*tile.shape[:-1], end)
        if bias is not None:
            scored += _as_bias(view(bias)[..., start : start + rows, :])
        elif mask == "causal":
            scored[..., -tile.shape[3] :] += _causal(tile.shape[3])
        total = _exponentials(scored)
        mixed = (scores @ v[:, :, :end]).reshape(*tile.shape[:-1], -1)
        done.append(mixed / mx.array(total))
    return mx.concatenate(done, axis=3)


def _exponentials(scores: Floats) -> Floats:
    """Softmax's numerators in place; returns their sums over the last axis."""
    with np.errstate(invalid="ignore"):
        scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    return cast(Floats, scores.sum(axis=-1, keepdims=True))


@lru_cache(maxsize=8)
def _causal(tokens: int) -> Floats:
    return np.triu(np.full((tokens, tokens), MASKED, np.float32), 1)


def _as_bias(mask: NDArray[Any]) -> Floats:
    if mask.dtype != np.bool_:
        return mask
    return np.where(mask, np.float32(0), np.float32(MASKED))


@lru_cache(maxsize=2)  # the layers of a step share one mask
def _additive(mask: mx.array) -> mx.array:
    return mask if mask.dtype == mx.float32 else (mask.astype(mx.float32) - 1) * -MASKED


def _by_group(mask: mx.array, kv_heads: int) -> mx.array:
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[1] == 1:
        return mx.expand_dims(mask, 2)
    return mx.unflatten(mask, 1, (kv_heads, -1))
