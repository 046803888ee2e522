"""Faster forms of what mlx-lm's models call most, for MLX's CPU device in float32.

On a CPU MLX computes exponentials one by one: 12-20 ns each, against 0.5 ns in NumPy. While a
prompt is computed the host has nothing else to do, so softmax and SwiGLU then run in NumPy, on
MLX's own memory. A decode step stays a lazy graph, so that it can be launched ahead, with the
exponential made of elementary operations. All else is left to the originals.
"""

import ctypes
import math
import shutil
import sys
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models import activations
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MASKED = -1e30
"""Added to a score, it leaves nothing of it; finite, so that a row without keys gives no NaN."""
TILE = 1 << 19
"""Scores computed at once: 2 MB stay in the cache."""
EAGER = 1 << 14
"""Elements from which NumPy is worth a wait for the device (50 us)."""
LAZY = 1 << 14
"""Elements from which `exp` is faster than MLX's own, which is one operation and not twenty."""
FUSED = 0 if shutil.which("g++") else LAZY
"""The same for a compiled function: MLX makes one loop of it where it finds this compiler."""
PIECE = 16
"""Rows that a compiled function takes at once."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_REUSED = 32 << 20
"""Bytes; the most that glibc takes for these."""

LOG2E = math.log2(math.e)
ROUND = 1.5 * 2**23
"""Added to a float32 below 2**22, it leaves the nearest integer in the low bits."""
EXP2 = (1.00000007, 0.693146949, 0.240221218, 0.0555074262, 0.00967545975, 0.00132669704)
"""2**f on [-1/2, 1/2] to 1e-7: interpolation at the Chebyshev nodes, lowest power first."""

_attention = mx.fast.scaled_dot_product_attention
_swiglu = activations.swiglu


def speed_up() -> None:
    """Put the functions of this module in the originals' place, for models imported from now on.

    Outputs agree to about 1e-6 of their scale. Prefill evaluates, so a model's call with more than
    one token a row must not be traced (`mx.compile`, `mx.grad`).
    """
    _keep_heap()
    mx.fast.scaled_dot_product_attention = attention
    activations.swiglu = swiglu


def forget() -> None:
    """Let go of the last step's masks."""
    _additive.cache_clear()


def _keep_heap() -> None:
    """Have glibc reuse what is freed: a page given back costs 3 us when it is touched again.

    Buffers of some MB come and go with every layer. `DeviceMemory.trim` gives the heap back when
    the engine is idle.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_REUSED)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)


# attention


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
    """`mx.fast.scaled_dot_product_attention`: (batch, heads, tokens, value dim).

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
    """Attention of one token a row; `q` (batch, kv heads, group, 1, head_dim) is scaled."""
    # Products with one row read the keys as they lie; with several BLAS copies them first.
    scores = (q @ mx.expand_dims(k, 2).swapaxes(-1, -2)).squeeze(3)
    if isinstance(mask, mx.array):
        scores = scores + _by_group(_additive(mask), scores.shape[1]).squeeze(-2)
    if scores.size < LAZY:
        return mx.softmax(scores, axis=-1) @ v
    weights = exp(scores - mx.max(scores, axis=-1, keepdims=True))
    return (weights @ v) / mx.sum(weights, axis=-1, keepdims=True)


def _prefill(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """Attention in tiles of queries; `q` (batch, kv heads, group, tokens, head_dim) is scaled."""
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
        view = _view(scores).reshape(*tile.shape[:-1], end)
        if bias is not None:
            view += _as_bias(_view(bias)[..., start : start + rows, :])
        elif mask == "causal":
            view[..., -tile.shape[3] :] += _causal(tile.shape[3])
        total = _exponentials(view)
        mixed = (scores @ v[:, :, :end]).reshape(*tile.shape[:-1], -1)
        done.append(mixed / mx.array(total))
    return mx.concatenate(done, axis=3)


def _exponentials(scores: Floats) -> Floats:
    """Turn scores into softmax's numerators in place; returns their sums over the last axis."""
    with np.errstate(invalid="ignore"):
        scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    return cast(Floats, scores.sum(axis=-1, keepdims=True))


@lru_cache(maxsize=8)
def _causal(tokens: int) -> Floats:
    """What a token's scores of itself and the tokens around it get added: (tokens, tokens)."""
    return np.triu(np.full((tokens, tokens), MASKED, np.float32), 1)


def _as_bias(mask: NDArray[Any]) -> Floats:
    if mask.dtype != np.bool_:
        return mask
    return np.where(mask, np.float32(0), np.float32(MASKED))


@lru_cache(maxsize=2)  # the layers of a step share one mask
def _additive(mask: mx.array) -> mx.array:
    return mask if mask.dtype == mx.float32 else (mask.astype(mx.float32) - 1) * -MASKED


def _by_group(mask: mx.array, kv_heads: int) -> mx.array:
    """A mask that broadcasts to (batch, heads, tokens, keys) for heads as (kv heads, group)."""
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[1] == 1:
        return mx.expand_dims(mask, 2)
    return mx.unflatten(mask, 1, (kv_heads, -1))


# activation


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """`silu(gate) * x`, elementwise."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return cast(mx.array, _swiglu(gate, x))
    if gate.ndim > 2 and gate.shape[-2] > 1:
        return _swiglu_eager(gate, x) if gate.size >= EAGER else cast(mx.array, _swiglu(gate, x))
    return _swiglu_lazy(gate, x) if gate.size >= FUSED else cast(mx.array, _swiglu(gate, x))


def _swiglu_eager(gate: mx.array, x: mx.array) -> mx.array:
    mx.eval(gate, x)
    out = np.negative(_view(gate))
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.divide(_view(gate), out, out=out)
    out *= _view(x)
    return mx.array(out)


def _swiglu_lazy(gate: mx.array, x: mx.array) -> mx.array:
    """In pieces, so that few shapes are compiled: MLX keeps 100 KB for each for good."""
    starts = list(range(PIECE, gate.shape[0], PIECE))
    if not starts:
        return _swiglu_compiled(gate, x)
    pieces = zip(mx.split(gate, starts), mx.split(x, starts), strict=True)
    return mx.concatenate([_swiglu_compiled(*piece) for piece in pieces])


@mx.compile
def _swiglu_compiled(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1 + exp(mx.minimum(-gate, 88.0)))


def exp(x: mx.array) -> mx.array:
    """e**x for float32 `x` of at most 88, to 3e-7 + 1e-7 |x| like MLX's own; 1e-38 below -87.

    2**n goes into the exponent's bits, 2**f of the rest is a polynomial (as Cephes does).
    """
    y = mx.maximum(x * LOG2E, -126.0)
    rounded = y + ROUND
    rest = y - (rounded - ROUND)
    power = mx.array(EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        power = power * rest + coefficient
    bits = power.view(mx.int32) + mx.left_shift(rounded.view(mx.int32), 23)
    return bits.view(mx.float32)


def _view(array: mx.array) -> NDArray[Any]:
    """The memory of an evaluated array, not a copy."""
    return np.array(array, copy=False)
