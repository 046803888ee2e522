"""GELU for MLX's CPU device, which computes the error function of each number by itself.

In tiles that stay in the processor's cache, NumPy takes a tenth of the time.
"""

import math

import mlx.core as mx
import numpy as np
from mlx.nn.layers.activations import gelu as _gelu
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TILE = 1 << 15
EAGER = 1 << 14
"""Elements from which NumPy is worth a wait for the device."""
STEP = 0.3275911
POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""erfc(z) = e**(-z*z) * (t * polynomial(t)) with t = 1 / (1 + STEP * z) and z >= 0, to 1.5e-7
(Abramowitz and Stegun, 7.1.26); highest power first."""


def gelu(x: mx.array) -> mx.array:
    """`x` times the normal distribution's share below `x`, elementwise, to 3e-7 of `x`.

    Evaluates, so it must not be traced.
    """
    if x.dtype != mx.float32 or x.size < EAGER:
        plain: mx.array = _gelu(x)
        return plain
    mx.eval(x)
    flat = np.array(x, copy=False).reshape(-1)
    out = np.empty_like(flat)
    scratch = np.empty((2, TILE), np.float32)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, TILE):
            tile = flat[start : start + TILE]
            _gelu_tile(tile, out[start : start + TILE], scratch[:, : tile.size])
    return mx.array(out.reshape(x.shape))


def _gelu_tile(x: Floats, out: Floats, scratch: Floats) -> None:
    """Write to `out` max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2, which is GELU for any sign."""
    z, t = scratch
    np.abs(x, out=z)
    z *= math.sqrt(0.5)
    np.multiply(z, STEP, out=t)
    t += 1
    np.reciprocal(t, out=t)
    np.multiply(t, POLYNOMIAL[0], out=out)
    for coefficient in POLYNOMIAL[1:]:
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
