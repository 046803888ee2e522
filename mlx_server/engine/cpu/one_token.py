"""Attention of one token a row over a plain KV cache, in NumPy on MLX's own memory.

MLX takes some 450 us for that in each layer, whatever the size: it evaluates 40 small operations,
most of them for rotary embeddings. For a row of a small model this takes a tenth of it.
"""

from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TABLE = 64
"""Positions whose angles are computed at once."""
TABLES = 64
"""Of those positions, at most."""
PROBED = 1000
"""A position at which even the slowest angle shows."""


class Cache(Protocol):
    """A `BatchKVCache` that `appends`."""

    padding: tuple[int, ...]

    @property
    def held(self) -> int: ...

    def append(self, *token: Floats) -> list[Floats]: ...


def can_attend(cache: Any) -> bool:
    return getattr(cache, "appends", False)


class Attention:
    """That of mlx-lm's `module`, which has a `rope`, and norms of queries and keys or none."""

    def __init__(self, module: Any) -> None:
        self._heads, self._kv_heads = module.n_heads, module.n_kv_heads
        self._width = module.k_proj.scales.shape[0] // self._kv_heads
        self._scale = np.float32(module.scale)
        self._norms = [
            (np.array(module[name].weight.astype(mx.float32)), module[name].eps)
            for name in ("q_norm", "k_norm")
            if name in module
        ]
        self._rotation = rotation_of(module.rope, self._width)

    def __call__(self, parts: list[Floats], cache: Cache) -> Floats:
        """(rows, heads · width) from queries, keys and values (rows, heads · width); `cache` grows
        by the latter.
        """
        queries, keys, values = (part.reshape(len(part), -1, self._width) for part in parts)
        if self._norms:
            queries, keys = map(_normed, (queries, keys), self._norms)
        start = cache.held
        positions = tuple(start - padding for padding in cache.padding)
        all_keys, all_values = cache.append(self._rotation(keys, positions), values)
        queries = self._rotation(queries, positions) * self._scale
        grouped = queries.reshape(len(queries), self._kv_heads, -1, self._width)
        out = np.empty_like(grouped)
        for row, padding in enumerate(cache.padding):
            own = slice(padding, start + 1)
            scores = grouped[row] @ all_keys[row, :, own].swapaxes(1, 2)
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            np.matmul(scores, all_values[row, :, own], out=out[row])
        return out.reshape(len(out), -1)


def _normed(x: Floats, norm: tuple[Floats, float]) -> Floats:
    weight, eps = norm
    square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    normed: Floats = x / np.sqrt(square + np.float32(eps)) * weight
    return normed


_rotations: dict[bytes, "Rotation"] = {}


def rotation_of(rope: Any, width: int) -> "Rotation":
    """The same for layers that do the same."""
    made = Rotation(rope, width)
    return _rotations.setdefault(made.sample, made)


class Rotation:
    """What mlx-lm's `rope` does to (rows, heads, width), read off what it does to probes: it turns
    pairs of numbers, neighbours or of two halves, by an angle for each position, and may scale
    them. `sample` tells it from others.
    """

    def __init__(self, rope: Any, width: int) -> None:
        self._rope = rope
        self._width = width
        first = np.zeros(width, np.float32)
        first[0] = 1
        self._step = int(np.abs(self._turned(first, 1, 1)[0, 1:]).argmax()) + 1
        ones = np.ones(width, np.float32)
        turned = self._turned(ones, PROBED, 1)[0]
        self._turns = int(np.flatnonzero(turned != 1).max()) + 1
        self.sample = turned.tobytes() + self._turned(ones, 1, 1).tobytes()
        self._tables: dict[int, tuple[Floats, Floats]] = {}
        self._positions: tuple[int, ...] = ()
        self._angles = self._of_table(0)

    def __call__(self, x: Floats, positions: tuple[int, ...]) -> Floats:
        if positions != self._positions:  # all layers of a step ask for the same
            found = [self._at(position) for position in positions]
            cos, sin = (np.stack(part)[:, None] for part in zip(*found, strict=True))
            self._positions, self._angles = positions, (cos, sin)
        cos, sin = self._angles
        out = x.copy()
        ones, others = self._pairs(x)
        turned_ones, turned_others = self._pairs(out)
        np.subtract(ones * cos, others * sin, out=turned_ones)
        np.add(ones * sin, others * cos, out=turned_others)
        return out

    def _pairs(self, x: Floats) -> tuple[Floats, Floats]:
        if self._step == 1:
            return x[..., : self._turns : 2], x[..., 1 : self._turns : 2]
        return x[..., : self._step], x[..., self._step : self._turns]

    def _at(self, position: int) -> tuple[Floats, Floats]:
        number, place = divmod(position, TABLE)
        if number not in self._tables:
            if len(self._tables) == TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[number] = self._of_table(number)
        cos, sin = self._tables[number]
        return cos[place], sin[place]

    def _of_table(self, number: int) -> tuple[Floats, Floats]:
        """Cosines and sines, scaled, (positions, pairs)."""
        probe = np.zeros(self._width, np.float32)
        self._pairs(probe)[0][:] = 1
        return self._pairs(self._turned(probe, number * TABLE, TABLE))

    def _turned(self, x: Floats, position: int, count: int) -> Floats:
        """`x` at so many positions, (positions, width)."""
        many = mx.broadcast_to(mx.array(x), (1, 1, count, len(x)))
        turned: Floats = np.array(self._rope(many, offset=position))[0, 0]
        return turned
