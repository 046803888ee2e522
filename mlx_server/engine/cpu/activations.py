"""SwiGLU, GELU and exp in float32 for MLX's CPU device.

MLX takes 12-20 ns for an exponential, NumPy 0.5 ns. Prefill runs NumPy on MLX's own memory; decode
stays a lazy graph, with the exponential made of elementary operations.
"""

import math
import shutil
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers import activations as nn
from mlx_lm.models import activations
from numpy.typing import NDArray

Floats = NDArray[np.float32]

EAGER = 1 << 14
"""Elements from which NumPy is worth a wait for the device (50 us)."""
LAZY = 1 << 14
"""Elements from which `exp` is faster than MLX's own."""
FUSED = 0 if shutil.which("g++") else LAZY
"""In a compiled function, which MLX fuses where it finds this compiler."""
PIECE = 16
GELU_TILE = 1 << 15
"""Elements; fits the processor's cache."""

LOG2E = math.log2(math.e)
ROUND = 1.5 * 2**23
"""Added to a float32 below 2**22, it leaves the nearest integer in the low bits."""
EXP2 = (1.00000007, 0.693146949, 0.240221218, 0.0555074262, 0.00967545975, 0.00132669704)
"""2**f on [-1/2, 1/2] to 1e-7: interpolation at the Chebyshev nodes, lowest power first."""
STEP = 0.3275911
ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""erfc(z) = e**(-z*z) * (t * polynomial(t)) with t = 1 / (1 + STEP * z) and z >= 0, to 1.5e-7
(Abramowitz and Stegun, 7.1.26); highest power first."""

_swiglu = activations.swiglu


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return cast(mx.array, _swiglu(gate, x))
    if gate.ndim > 2 and gate.shape[-2] > 1:
        return _swiglu_eager(gate, x) if gate.size >= EAGER else cast(mx.array, _swiglu(gate, x))
    return _swiglu_lazy(gate, x) if gate.size >= FUSED else cast(mx.array, _swiglu(gate, x))


def _swiglu_eager(gate: mx.array, x: mx.array) -> mx.array:
    mx.eval(gate, x)
    out = np.negative(view(gate))
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.divide(view(gate), out, out=out)
    out *= view(x)
    return mx.array(out)


def _swiglu_lazy(gate: mx.array, x: mx.array) -> mx.array:
    """In pieces, so that few shapes are compiled: MLX keeps 100 KB for each."""
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


def gelu(x: mx.array) -> mx.array:
    """GELU, elementwise, to 3e-7 of `x`. Evaluates, so it must not be traced."""
    if x.dtype != mx.float32 or x.size < EAGER:
        plain: mx.array = nn.gelu(x)
        return plain
    mx.eval(x)
    flat = view(x).reshape(-1)
    out = np.empty_like(flat)
    scratch = np.empty((2, GELU_TILE), np.float32)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, GELU_TILE):
            tile = flat[start : start + GELU_TILE]
            _gelu_tile(tile, out[start : start + GELU_TILE], scratch[:, : tile.size])
    return mx.array(out.reshape(x.shape))


def _gelu_tile(x: Floats, out: Floats, scratch: Floats) -> None:
    """max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2"""
    z, t = scratch
    np.abs(x, out=z)
    z *= math.sqrt(0.5)
    np.multiply(z, STEP, out=t)
    t += 1
    np.reciprocal(t, out=t)
    np.multiply(t, ERFC[0], out=out)
    for coefficient in ERFC[1:]:
        out += coefficient
        out *= t
    np.multiply(z, z, out=t)
    np.negative(t, out=t)
    np.exp(t, out=t)
    out *= t
    out *= z  # |x| / sqrt(2)
    out *= math.sqrt(0.5)
    np.maximum(x, 0, out=t)
    np.subtract(t, out, out=out)


def view(array: mx.array) -> NDArray[Any]:
    return np.array(array, copy=False)
