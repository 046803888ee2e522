"""Quantized KV caches for continuous batching; mlx-lm has one for a single sequence only.

Keys and values are triples (packed, scales, biases) from `mx.quantize`; padding, offsets and masks
are mlx-lm's. Layers bounded by a window or a recurrent state stay as they are.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from mlx_server.engine.cache.rows import BatchKVCache
from mlx_server.engine.memory import device_name

Planes = tuple[mx.array, mx.array, mx.array]
"""Packed numbers, scales and biases, each (rows, heads, tokens, width)."""

GROUP_SIZES = (64, 32)
"""Numbers that share a scale and a bias; the first that divides a head is taken."""
DIRECT_HEAD_DIM = 64
"""Attention over packed values is right on Metal for heads that are multiples of this: some
releases of MLX leave columns out otherwise (https://github.com/ml-explore/mlx/issues/4250)."""


class CannotQuantize(Exception): ...


def quantize_cache(cache: Many[Any], bits: int) -> list[Any]:
    return [_quantized(layer, bits) for layer in cache]


def check_support(model: Any, bits: int) -> int:
    """How many of the model's caches are quantized.

    Traces, without computing, a prefill chunk, a merge and a decode step. Raises CannotQuantize
    when attention cannot read the result: most MLA, sinks, some layers that share keys.
    """
    cache = quantize_cache(make_prompt_cache(model), bits)
    count = _count_quantized(cache)
    if not count:
        return 0
    try:
        model(mx.zeros((1, 2), dtype=mx.int32), cache=cache)
        cache = [layer.merge([layer]) for layer in cache]
        model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CannotQuantize(
            "kv_bits is set and its attention cannot use a quantized KV cache "
            f"({type(error).__name__}: {error})"
        ) from error
    return count


def group_size_of(*widths: int) -> int:
    """Raises CannotQuantize if no group size divides all widths."""
    for size in GROUP_SIZES:
        if all(width and width % size == 0 for width in widths):
            return size
    sizes = " and ".join(map(str, sorted(set(widths))))
    raise CannotQuantize(
        f"kv_bits needs heads of a multiple of {GROUP_SIZES[-1]} numbers, and they have {sizes}"
    )


class _QuantizedArrays:
    """Storage that the two caches share.

    mlx-lm's attention takes packed arrays where the cache has `bits`, plain ones otherwise. A
    decode step is fastest packed. A prefill chunk is dequantized: fused attention needs no scores
    (heads, chunk, tokens) in memory. So is everything on CUDA, whose packed product rejects slices.
    """

    keys: Planes | None
    values: Planes | None
    step: int

    def __init__(self, bits: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kv_bits = bits
        self._direct = device_name() != "cuda"
        self._packed = False

    @property
    def bits(self) -> int:
        """Absent when the arrays last returned were dequantized."""
        if not self._packed:
            raise AttributeError("bits")
        return self.kv_bits

    @property
    def group_size(self) -> int:
        assert self.keys is not None
        packed, scales, _ = self.keys
        return packed.shape[3] * 8 * packed.itemsize // self.kv_bits // scales.shape[3]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*(self.keys or ()), *(self.values or ())))

    def _write(self, keys: mx.array, values: mx.array, start: int) -> None:
        widths = keys.shape[3], values.shape[3]
        size = group_size_of(*widths)
        aligned = all(width % DIRECT_HEAD_DIM == 0 for width in widths)
        self._packed = self._direct and aligned and keys.shape[2] == 1
        self.keys = self._written(self.keys, mx.quantize(keys, size, self.kv_bits), start)
        self.values = self._written(self.values, mx.quantize(values, size, self.kv_bits), start)

    def _written(self, held: Planes | None, new: Planes, start: int) -> Planes:
        tokens = new[0].shape[2]
        if held is None or start + tokens > held[0].shape[2]:
            room = -(-tokens // self.step) * self.step
            space = _each(lambda x: mx.zeros((*x.shape[:2], room, x.shape[3]), x.dtype), new)
            held = space if held is None else _joined(_part(held, 0, start), space)
        for buffer, plane in zip(held, new, strict=True):
            buffer[..., start : start + tokens, :] = plane
        return held

    def _read(self, end: int) -> tuple[Any, Any]:
        assert self.keys is not None
        assert self.values is not None
        keys, values = _part(self.keys, 0, end), _part(self.values, 0, end)
        if self._packed:
            return keys, values
        size, bits = self.group_size, self.kv_bits
        return mx.dequantize(*keys, size, bits), mx.dequantize(*values, size, bits)


class QuantizedKVCache(_QuantizedArrays, KVCache):  # type: ignore[misc]
    offset: int

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self._write(keys, values, self.offset)
        self.offset += keys.shape[2]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        return self._read(self.offset)

    @classmethod
    def merge(cls, caches: list["QuantizedKVCache"]) -> "BatchQuantizedKVCache":
        return BatchQuantizedKVCache.merge(caches)


class BatchQuantizedKVCache(_QuantizedArrays, BatchKVCache):
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self._write(keys, values, self._idx)
        self._idx += keys.shape[2]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        return self._read(self._idx)

    @classmethod
    def merge(cls, caches: Many[QuantizedKVCache]) -> "BatchQuantizedKVCache":
        merged = cls(caches[0].kv_bits, [0] * len(caches))
        merged._take(caches)
        return merged


def _planes(arrays: Iterable[mx.array]) -> Planes:
    packed, scales, biases = arrays
    return packed, scales, biases


def _each(change: Callable[[mx.array], mx.array], planes: Planes) -> Planes:
    return _planes(map(change, planes))


def _part(planes: Planes, start: int, end: int) -> Planes:
    return _each(lambda x: x[..., start:end, :], planes)


def _joined(first: Planes, second: Planes) -> Planes:
    pairs = zip(first, second, strict=True)
    return _planes(mx.concatenate(list(pair), axis=2) for pair in pairs)


def _quantized(layer: Any, bits: int) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*quantize_cache(layer.caches, bits))
    # Not of its subclasses: they are kept in other ways.
    return QuantizedKVCache(bits) if type(layer) is KVCache else layer


def _count_quantized(cache: Many[Any]) -> int:
    return sum(
        _count_quantized(layer.caches)
        if isinstance(layer, CacheList)
        else isinstance(layer, QuantizedKVCache)
        for layer in cache
    )
