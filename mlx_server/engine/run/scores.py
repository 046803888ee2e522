"""What attention's scores take of memory where they are written out, asked of MLX.

It has fused kernels for some sizes of heads, types of numbers and kinds of masks on each device.
Elsewhere a chunk's tokens times all keys before them are held, for each head.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache

BUDGET = 256 << 20
"""Bytes of one layer's scores."""
COPIES = 2
"""Scores and what softmax makes of them."""
PROBED = 64
"""Tokens for which MLX is asked; it takes another kernel for very few."""
FUSED = "ScaledDotProductAttention"


def bytes_per_pair(model: Any, new_cache: Callable[[], Cache]) -> int:
    """Bytes for each token of a chunk and key, in the layer with most; 0 if all are fused.

    Computes nothing on a device. Attention that a model writes out itself is not seen.
    """
    original = mx.fast.scaled_dot_product_attention
    most = 0

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any
    ) -> mx.array:
        nonlocal most
        unfused = 0 if _is_fused(original, q, k, v, **options) else q.shape[1] * q.itemsize
        made = isinstance(mask, mx.array) and mask.ndim == 4
        own = mask.shape[1] * mask.itemsize if made and mask.shape[1] > 1 else 0
        most = max(most, COPIES * max(unfused, own))
        return original(q, k, v, mask=mask, **options)

    mx.fast.scaled_dot_product_attention = attention
    try:
        model(mx.zeros((1, 2), dtype=mx.int32), cache=new_cache())
    finally:
        mx.fast.scaled_dot_product_attention = original
    return most


def tokens_within(pair_bytes: int, position: int) -> int:
    """Tokens of a chunk after `position` others, whose scores fit the budget."""
    if not pair_bytes:
        return BUDGET
    half = position / 2
    return int(math.sqrt(half * half + BUDGET / pair_bytes) - half)


def _is_fused(
    attention: Callable[..., mx.array], *heads: mx.array, scale: float, **options: Any
) -> bool:
    many = [mx.zeros((1, x.shape[1], PROBED, x.shape[3]), x.dtype) for x in heads]
    graph = io.StringIO()
    mx.export_to_dot(graph, attention(*many, scale=scale, mask="causal", **options))
    return FUSED in graph.getvalue()
