"""Operations on mlx-lm's KV caches, and their cost in bytes."""

import bisect
import copy
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from mlx_server.engine.cache.layout import Cache, leaves
from mlx_server.engine.cache.rows import MOST_GAPS, BatchKVCache, BatchRotatingKVCache, rounded
from mlx_server.engine.cache.rows import merge as merge_layers
from mlx_server.engine.memory import device_name
from mlx_server.engine.ranks.messages import CacheCost
from mlx_server.engine.run.weights import ModelError

FIRST_SIZE_STEP = 32
"""Tokens by which layers' first sizes differ."""
FULL_SIZE_STEP = 8
"""Tokens by which they differ with the whole prompt."""
STAGGERED_LAYERS = 32
"""Layers after which sizes repeat."""


class KvCost:
    """Derived from a cache that holds one token, and `held` bytes more for each sequence. `own` is
    what it costs in this rank.
    """

    STEP = 256
    """Tokens by which mlx-lm's caches grow."""

    def __init__(self, cache: Cache, held: int = 0) -> None:
        parts = [_part(leaf) for leaf in leaves(cache)]
        fixed = held + sum(fixed for fixed, _, _ in parts)
        self.own = CacheCost(fixed, [(size, window) for _, size, window in parts if size])
        self._ranks = [self.own]

    def beside(self, other: "KvCost") -> "KvCost":
        """Of both models' caches for the same tokens."""
        both, one, another = copy.copy(self), self.own, other.own
        both.own = CacheCost(one.fixed + another.fixed, one.growing + another.growing)
        both._ranks = [both.own]
        return both

    def or_more(self, others: Iterable[CacheCost]) -> "KvCost":
        """In the rank with most of this one and `others`."""
        most = copy.copy(self)
        most._ranks = [self.own, *(other for other in others if other != self.own)]
        return most

    def bytes(self, rows: int, tokens: int) -> int:
        """Of `rows`, the longest of which holds `tokens`."""
        # A cache grows from its present length, which after a merge is no multiple of the step.
        room = tokens + self.STEP - 1
        return rows * max(
            one.fixed + sum(size * min(room, window or room) for size, window in one.growing)
            for one in self._ranks
        )

    def of_block(self, tokens: int) -> int:
        """Bytes of `tokens` in the layers that keep all tokens."""
        return tokens * max(
            sum(size for size, window in one.growing if window is None) for one in self._ranks
        )

    def of_snapshot(self) -> int:
        """Bytes of what the others keep."""
        return max(
            one.fixed + sum(size * window for size, window in one.growing if window is not None)
            for one in self._ranks
        )

    def longest(self, limit: int, context_length: int) -> int:
        """The most tokens, up to `context_length`, of one sequence in `limit` bytes."""
        if self.bytes(1, context_length) <= limit:
            return context_length
        lengths = range(context_length)
        fitting = bisect.bisect_right(lengths, limit, key=lambda tokens: self.bytes(1, tokens))
        return max(0, fitting - 1)


def _part(leaf: Any) -> tuple[int, int, int | None]:
    """Fixed bytes, bytes per token, and window in tokens, of a layer's cache."""
    if isinstance(leaf, KVCache | RotatingKVCache | ChunkedKVCache) and leaf.keys is not None:
        array = leaf.keys if isinstance(leaf.keys, mx.array) else leaf.keys[0]
        window = getattr(leaf, "max_size", None) or getattr(leaf, "chunk_size", None)
        return (0, leaf.nbytes // array.shape[2], window)
    return (int(leaf.nbytes), 0, None)


def cache_bytes(cache: Cache) -> int:
    return sum(int(layer.nbytes) for layer in cache)


def merge(caches: list[Cache]) -> Cache:
    """One batch cache with a row for each. Raises ModelError where there is none."""
    first = caches[0]
    for layer in first:
        if not hasattr(layer, "merge"):
            raise ModelError(f"{type(layer).__name__} does not support batching")
    return [merge_layers(layers) for layers in zip(*caches, strict=True)]


def extend(cache: Cache, other: Cache) -> Cache:
    """Append the rows of `other`; both are batch caches."""
    if not cache:
        return other
    for layer, more in zip(cache, other, strict=True):
        layer.extend(more)
    return cache


def keep_rows(cache: Cache, rows: list[int]) -> Cache:
    if not rows:
        return []
    for layer in cache:
        layer.filter(rows)
    return cache


def copy_of_rows(cache: Cache, rows: list[int]) -> Cache:
    """They alone, without gaps; `cache` stays as it is."""
    return keep_rows([_another(layer) for layer in cache], rows)


def _another(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_another, layer.caches))
    return copy.copy(layer)


def can_roll_back(cache: Cache) -> bool:
    """Whether single rows of this batch cache can be shortened by what a pass has computed."""
    return all(isinstance(leaf, BatchKVCache | BatchRotatingKVCache) for leaf in leaves(cache))


def can_shorten(cache: Cache) -> bool:
    """Whether they can be shortened by the tokens of several passes."""
    return all(isinstance(leaf, BatchKVCache) for leaf in leaves(cache))


def can_go_back(cache: Cache) -> bool:
    """Whether states can be put back that cannot be shortened, and the rest be shortened."""
    return all(isinstance(leaf, BatchKVCache | ArraysCache) for leaf in leaves(cache))


def states(cache: Cache) -> list[list[mx.array | None]]:
    """What layers keep in place of keys and values."""
    return [list(leaf.cache) for leaf in leaves(cache) if isinstance(leaf, ArraysCache)]


def put_back(cache: Cache, before: list[list[mx.array | None]], chosen: list[bool]) -> None:
    """Give the `chosen` rows the states from `before`."""
    rows = mx.array(chosen)
    recurrent = (leaf for leaf in leaves(cache) if isinstance(leaf, ArraysCache))
    for leaf, old in zip(recurrent, before, strict=True):
        leaf.cache = [_put_back(new, was, rows) for new, was in zip(leaf.cache, old, strict=True)]


def _put_back(new: mx.array | None, old: mx.array | None, rows: mx.array) -> mx.array | None:
    if new is None:
        return None
    old = mx.zeros_like(new) if old is None else old
    return mx.where(rows.reshape(-1, *[1] * (new.ndim - 1)), old, new)


def has_gaps(cache: Cache) -> bool:
    """Whether arrays hold anything between a row's tokens."""
    return any(isinstance(leaf, BatchKVCache) and leaf.most_gaps for leaf in leaves(cache))


def roll_back(cache: Cache, rejected: list[int]) -> None:
    """Forget so many of the last tokens of each row."""
    for leaf in leaves(cache):
        if isinstance(leaf, ArraysCache):
            continue
        leaf.roll_back(rejected)
        if isinstance(leaf, BatchKVCache) and leaf.most_gaps > MOST_GAPS:
            leaf.close_gaps()


def loose_ends(cache: Cache) -> list[mx.array]:
    """Paddings that every step changes and only one layer's need be known for."""
    states = [leaf for leaf in leaves(cache) if isinstance(leaf, ArraysCache)]
    paddings = (padding for leaf in states for padding in (leaf.left_padding, leaf.lengths))
    return [padding for padding in paddings if padding is not None]


def reserve(cache: Cache, tokens: int, chunk: int) -> None:
    """Size a cache of one sequence for a prompt of `tokens` more, `chunk` of them next.

    Growing copies. On a CPU sizes are staggered, so that layers grow in turn.
    """
    staggered = device_name() == "cpu"
    for index, leaf in enumerate(leaves(cache)):
        if not isinstance(leaf, KVCache):
            continue
        if staggered:
            leaf.step = _staggered(index % STAGGERED_LAYERS, leaf, tokens, chunk)
        else:
            leaf.step = rounded(leaf.offset + tokens) - leaf.offset


def _staggered(place: int, leaf: KVCache, tokens: int, chunk: int) -> int:
    whole = tokens + FULL_SIZE_STEP * place
    first = FIRST_SIZE_STEP * (place + 1)
    return first if leaf.keys is None and chunk < first < whole else whole


def pad_right(cache: Cache, lengths: list[int]) -> None:
    """Announce that the next tokens are padded to the longest of `lengths`."""
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=padding)


def unpad(cache: Cache) -> None:
    """Move that padding to the left, where decoding ignores it."""
    for layer in cache:
        layer.finalize()
    mx.eval([layer.state for layer in cache])
