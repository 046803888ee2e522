"""GGUF's quantized tensors as MLX's: groups of 32 weights that are scale · quant + bias.

Types that are such groups keep their quants; others are dequantized and quantized anew.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K, dequantize

if TYPE_CHECKING:
    import mlx.core as mx
    from gguf import ReaderTensor

GROUP = 32
PART_WEIGHTS = 1 << 24
"""Converted at a time."""
PLAIN = (Kind.F32, Kind.F16, Kind.BF16, Kind.F64)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Groups(NamedTuple):
    """(groups, 32) quants, (groups,) scales and biases."""

    quants: Bytes
    scales: Floats
    biases: Floats


class Layer(NamedTuple):
    """A quantized layer: `weight` (rows, words), `scales` and `biases` (rows, groups)."""

    weight: "mx.array"
    scales: "mx.array"
    biases: "mx.array"
    bits: int


def _halves(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)[:, 0]


def _nibbles(blocks: Bytes) -> Bytes:
    """Low halves of each 16 or 32 bytes first, then the high ones."""
    shifted = blocks[:, :, None, :] >> np.array([0, 4], dtype=np.uint8)[None, None, :, None]
    return (shifted & np.uint8(15)).reshape(len(blocks), -1)


def _fifth_bits(blocks: Bytes) -> Bytes:
    return np.unpackbits(np.ascontiguousarray(blocks), axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Groups:
    scales = _halves(blocks, 0)
    return Groups(_nibbles(blocks[:, None, 2:]), scales, -8 * scales)


def _q4_1(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, None, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: Bytes) -> Groups:
    scales = _halves(blocks, 0)
    quants = _nibbles(blocks[:, None, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Groups(quants, scales, -16 * scales)


def _q5_1(blocks: Bytes) -> Groups:
    quants = _nibbles(blocks[:, None, 8:]) | _fifth_bits(blocks[:, 4:8])
    return Groups(quants, _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: Bytes) -> Groups:
    scales = _halves(blocks, 0)
    return Groups(blocks[:, 2:] ^ np.uint8(128), scales, -128 * scales)


def _q4_k(blocks: Bytes) -> Groups:
    quants = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, GROUP)
    return Groups(quants, *_k_scales(blocks))


def _q5_k(blocks: Bytes) -> Groups:
    quants = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, GROUP)
    high = blocks[:, 16:48][:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]
    quants |= (high & np.uint8(1)) << np.uint8(4)
    return Groups(quants.reshape(-1, GROUP), *_k_scales(blocks))


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Eight groups share a block's two halves, each by six bits of its own."""
    scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    whole = _halves(blocks, 0)[:, None] * scales.astype(np.float32)
    offset = -_halves(blocks, 2)[:, None] * minima.astype(np.float32)
    return whole.reshape(-1), offset.reshape(-1)


class _Exact(NamedTuple):
    bits: int
    block_bytes: int
    groups: Callable[[Bytes], Groups]


EXACT = {
    Kind.Q4_0: _Exact(4, 18, _q4_0),
    Kind.Q4_1: _Exact(4, 20, _q4_1),
    Kind.Q5_0: _Exact(5, 22, _q5_0),
    Kind.Q5_1: _Exact(5, 24, _q5_1),
    Kind.Q8_0: _Exact(8, 34, _q8_0),
    Kind.Q4_K: _Exact(4, 144, _q4_k),
    Kind.Q5_K: _Exact(5, 176, _q5_k),
}
ANEW = {
    **dict.fromkeys((Kind.Q2_K, Kind.IQ1_S, Kind.IQ1_M, Kind.TQ1_0, Kind.TQ2_0), 4),
    **dict.fromkeys((Kind.Q3_K, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S), 5),
    **dict.fromkeys((Kind.IQ3_XXS, Kind.IQ3_S), 5),
    **dict.fromkeys((Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4), 6),
    **dict.fromkeys((Kind.Q6_K, Kind.Q8_1, Kind.Q8_K), 8),
}
"""Bits for types without groups of 32 equal steps: enough to add little to their own error."""


def values(tensor: "ReaderTensor") -> Floats:
    """Dequantized, in the tensor's own shape, the last dimension innermost."""
    return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def quantized(tensor: "ReaderTensor", bits: int | None, dtype: "mx.Dtype") -> Layer | None:
    """The tensor in `bits`, or in what comes closest to its own; None where that is no layer for
    MLX to quantize.
    """
    columns = int(tensor.shape[0])
    kind = tensor.tensor_type
    if len(tensor.shape) != 2 or columns % GROUP or (bits is None and kind in PLAIN):
        return None
    exact = EXACT.get(kind)
    rows = max(1, PART_WEIGHTS // columns)
    parts = (tensor.data[i : i + rows] for i in range(0, len(tensor.data), rows))
    if exact is not None and bits in (None, exact.bits):
        return _joined([_keep(part, exact, columns, dtype) for part in parts])
    width = bits or ANEW[kind]
    return _joined([_quantize(part, kind, width, dtype) for part in parts])


def _keep(data: Bytes, exact: _Exact, columns: int, dtype: "mx.Dtype") -> Layer:
    import mlx.core as mx

    quants, scales, biases = exact.groups(data.reshape(-1, exact.block_bytes))
    rows = len(data)
    shape = (rows, columns // GROUP)
    return Layer(
        mx.array(_packed(quants.reshape(rows, columns), exact.bits)),
        mx.array(scales.reshape(shape)).astype(dtype),
        mx.array(biases.reshape(shape)).astype(dtype),
        exact.bits,
    )


def _packed(quants: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """(rows, columns) quants in `bits` each, the first in the lowest."""
    if bits < 8:
        ones = (quants[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
        quants = np.packbits(ones.reshape(len(quants), -1), axis=1, bitorder="little")
    return np.ascontiguousarray(quants).view(np.uint32)


def _quantize(data: Bytes, kind: Kind, bits: int, dtype: "mx.Dtype") -> Layer:
    import mlx.core as mx

    weight, scales, biases = mx.quantize(mx.array(dequantize(data, kind)), GROUP, bits)
    return Layer(weight, scales.astype(dtype), biases.astype(dtype), bits)


def _joined(parts: list[Layer]) -> Layer:
    import mlx.core as mx

    weight = mx.concatenate([part.weight for part in parts])
    scales = mx.concatenate([part.scales for part in parts])
    layer = Layer(weight, scales, mx.concatenate([p.biases for p in parts]), parts[0].bits)
    mx.eval(layer.weight, layer.scales, layer.biases)
    return layer
