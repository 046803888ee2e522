"""mlx-lm's KV caches of a batch, with the rows' lengths known to the host.

mlx-lm keeps them on the device, in every layer: a row that leaves then makes the host wait once a
layer, an offset that nothing reads is added to for ever, and attention gets a mask where nothing is
padded, for which CUDA has no fused kernel.
"""

import itertools
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as Many
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, dynamic_roll
from numpy.typing import NDArray

from mlx_server.engine.cache.layout import put_arrays, token_arrays
from mlx_server.engine.memory import device_name

STEP = 256
"""Tokens by which arrays grow."""
MOST_GAPS = 32
"""Tokens that the gaps of a row may have before they are closed, which moves all of the cache."""

Gaps = tuple[tuple[int, int], ...]
"""Where a row's tokens from one place to another are none of its own, in rising order."""

Mask = mx.array | str | None


def rounded(tokens: int) -> int:
    """Tokens of arrays that are to hold at least so many.

    Off a CPU a multiple of `STEP`: CUDA's fastest attention is for such arrays alone, and is
    prepared anew for each size. On a CPU growing is slow, and layers had better grow in turn.
    """
    return tokens if device_name() == "cpu" else -(-tokens // STEP) * STEP


def merge(layers: Many[Any]) -> Any:
    """One layer's caches of several sequences as rows of a batch; a single plain one as it is."""
    first = layers[0]
    if type(first) is CacheList:
        return CacheList(*(merge(parts) for parts in zip(*(x.caches for x in layers), strict=True)))
    if type(first) is KVCache:
        return BatchKVCache.merge(layers)
    if type(first) is RotatingKVCache:
        return BatchRotatingKVCache.merge(layers)
    return first.merge(layers)


class BatchKVCache(mlx_lm.BatchKVCache):  # type: ignore[misc]
    """`padding` is how many tokens on the left of each row are not its own.

    What single rows have to forget leaves gaps, which attention passes over until they are closed.
    """

    keys: Any
    values: Any

    def __init__(self, left_padding: Iterable[int]) -> None:
        self.keys = self.values = None
        self.padding = tuple(left_padding)
        self._idx = 0
        self._right_padding: tuple[int, ...] | None = None
        self._gaps: tuple[Gaps, ...] = ((),) * len(self.padding)
        self._unshared: weakref.ref[mx.array] | None = None

    @property
    def offset(self) -> mx.array:
        # A handle of its own, since models may change it in place.
        return mx.array(_offsets(self.padding, self._gaps, self._idx))

    @property
    def left_padding(self) -> mx.array:
        return mx.array(self.padding)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.keys, self.values, self.padding, self._idx

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.keys = _written(self.keys, keys, self._idx)
        self.values = _written(self.values, values, self._idx)
        self._idx += keys.shape[2]
        self._own()
        held: tuple[Any, Any] = self.keys_and_values()
        return held

    @property
    def held(self) -> int:
        """Tokens of the longest row, its padding and gaps included."""
        return self._idx

    def _own(self) -> None:
        """No other array has the memory of these, but for views of what is held now."""
        if isinstance(self.keys, mx.array):
            self._unshared = weakref.ref(self.keys)

    @property
    def appends(self) -> bool:
        """Whether `append` may be called, and each row holds nothing between its own tokens."""
        plain = type(self) is BatchKVCache and isinstance(self.keys, mx.array)
        return plain and self.keys.dtype == mx.float32 and not any(self._gaps)

    def append(self, *token: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Add keys and values (rows, heads, width) of a token a row, on a CPU and without a graph.

        Returns all keys and values, in MLX's memory, (rows, heads, tokens, width); past `held`
        they mean nothing.
        """
        size = self.keys.shape[2]
        unshared = self._unshared is not None and self._unshared() is self.keys
        if self._idx == size or not unshared:
            grown = rounded(self._idx + STEP) if self._idx == size else size
            # Others may hold the same memory, where nothing is to be written.
            self.keys, self.values = (_copy(x, self._idx, grown) for x in token_arrays(self))
            self._own()
        views = [np.array(x, copy=False) for x in (self.keys, self.values)]
        for view, new in zip(views, token, strict=True):
            view[:, :, self._idx] = new
        self._idx += 1
        return views

    def make_mask(
        self, tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Mask:
        if any(self._gaps):
            return _mask_with_gaps(self.padding, self._gaps, self._idx, tokens, window_size)
        all_seen = window_size is None or self._idx + tokens <= window_size
        if all_seen and not any(self.padding):
            if tokens == 1:
                return None
            if not return_array:
                return "causal"
        mask: mx.array = super().make_mask(tokens, window_size=window_size)
        return mask

    def prepare(self, *, right_padding: Many[int], **_: Any) -> None:
        """Announce that so many of the next tokens of each row, the last ones, are not its own."""
        self.close_gaps()
        self._right_padding = tuple(right_padding) if any(right_padding) else None

    def finalize(self) -> None:
        if self._right_padding is None:
            return
        shifts = mx.array(self._right_padding)[:, None]
        put_arrays(self, [dynamic_roll(x, shifts, axis=2) for x in token_arrays(self)])
        pairs = zip(self.padding, self._right_padding, strict=True)
        self.padding = tuple(left + right for left, right in pairs)
        self._right_padding = None

    def roll_back(self, rejected: Many[int]) -> None:
        """Forget so many of the last tokens of each row."""
        pairs = zip(self._gaps, rejected, strict=True)
        rows = [_shortened(gaps, self._idx, count) for gaps, count in pairs]
        self._idx = max(end for _, end in rows)
        self._gaps = tuple(
            (*gaps, (end, self._idx)) if end < self._idx else gaps for gaps, end in rows
        )

    @property
    def most_gaps(self) -> int:
        """Tokens in the gaps of the row that has most."""
        return max(map(_width, self._gaps))

    def close_gaps(self) -> None:
        if any(self._gaps):
            self._gather(range(len(self.padding)))

    def _gather(self, rows: Many[int]) -> None:
        """Hold these rows alone, their own tokens together and at the end."""
        padding = tuple(self.padding[row] for row in rows)
        gaps = tuple(self._gaps[row] for row in rows)
        widths = [one + _width(others) for one, others in zip(padding, gaps, strict=True)]
        excess = min(widths)
        if any(gaps) or excess:
            own = partial(_own_tokens, tuple(rows), padding, gaps, self._idx)
            arrays = [own(x, rounded(x.shape[2] - excess)) for x in token_arrays(self)]
        else:
            chosen = mx.array(list(rows))
            arrays = [x[chosen] for x in token_arrays(self)]
        put_arrays(self, arrays)
        self._own()
        self.padding = tuple(width - excess for width in widths)
        self._idx -= excess
        self._gaps = ((),) * len(padding)

    def trim(self, n: int) -> int:
        self.close_gaps()
        n = min(self._idx, n)
        self._idx -= n
        return n

    def filter(self, batch_indices: Many[int]) -> None:
        self._gather(batch_indices)

    def extend(self, other: "BatchKVCache") -> None:
        self.close_gaps()
        other.close_gaps()
        mine, theirs = token_arrays(self), token_arrays(other)
        index = max(self._idx, other._idx)
        left, right = index - self._idx, index - other._idx
        if mine or theirs:
            size = max(x.shape[2] for x in (*mine, *theirs))
            mine = [_moved(x, left, size) for x in mine] or _empty(theirs, len(self.padding), size)
            theirs = [_moved(x, right, size) for x in theirs] or _empty(
                mine, len(other.padding), size
            )
            pairs = zip(mine, theirs, strict=True)
            put_arrays(self, [mx.concatenate(list(pair)) for pair in pairs])
            self._own()
        self.padding = (*(p + left for p in self.padding), *(p + right for p in other.padding))
        self._gaps = ((),) * len(self.padding)
        self._idx = index

    @classmethod
    def merge(cls, caches: Many[Any]) -> "BatchKVCache":
        merged = cls([0] * len(caches))
        merged._take(caches)
        return merged

    def _take(self, caches: Many[Any]) -> None:
        """Become the rows that are in `caches` of a sequence each."""
        self._idx = max(cache.offset for cache in caches)
        self.padding = tuple(self._idx - cache.offset for cache in caches)
        held = [token_arrays(cache) for cache in caches]
        if len(caches) == 1:
            put_arrays(self, held[0])
            return
        filled = next((arrays for arrays in held if arrays), None)
        if filled is None:
            return
        size = rounded(self._idx)
        rows = [
            [_moved(x[:, :, : self._idx - padding], padding, size) for x in arrays]
            or _empty(filled, 1, size)
            for arrays, padding in zip(held, self.padding, strict=True)
        ]
        put_arrays(self, [mx.concatenate(list(column)) for column in zip(*rows, strict=True)])
        self._own()


class BatchRotatingKVCache(mlx_lm.BatchRotatingKVCache):  # type: ignore[misc]
    """`lengths` is how many tokens each row has had, those beyond the window included."""

    keys: Any
    values: Any
    left_padding: mx.array
    offset: mx.array
    _idx: int
    _offset: int
    max_size: int

    def __init__(self, max_size: int, left_padding: list[int]) -> None:
        super().__init__(max_size, left_padding)
        self.lengths = [-padding for padding in left_padding]
        self._right_padding: list[int] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.lengths = [length + keys.shape[2] for length in self.lengths]
        arrays: tuple[Any, Any] = super().update_and_fetch(keys, values)
        return arrays

    def make_mask(
        self, tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Mask:
        held = min(self.max_size - 1, self._offset)
        all_seen = held + tokens <= min(window_size or self.max_size, self.max_size)
        if all_seen and min(self.lengths) >= held:
            if tokens == 1:
                return None
            if not return_array:
                return "causal"
        mask: mx.array = super().make_mask(tokens, window_size, return_array)
        return mask

    def prepare(self, *, right_padding: list[int], **options: Any) -> None:
        super().prepare(right_padding=right_padding, **options)
        self._right_padding = right_padding

    def finalize(self) -> None:
        super().finalize()
        pairs = zip(self.lengths, self._right_padding or [0] * len(self.lengths), strict=True)
        self.lengths = [length - padding for length, padding in pairs]
        self._right_padding = []

    def roll_back(self, rejected: Many[int]) -> None:
        """Forget so many of the last tokens of each row; at least one of the pass just computed
        must stay, so that a whole window is left.
        """
        end, common = self._idx - min(rejected), min(rejected)
        extra = mx.array([one - common for one in rejected])
        if common:
            self.keys, self.values = self.keys[:, :, :end], self.values[:, :, :end]
        if max(rejected) > common:
            self.keys = dynamic_roll(self.keys, extra[:, None], axis=2)
            self.values = dynamic_roll(self.values, extra[:, None], axis=2)
            # What a row has too few of comes to its left. Negative: a full row has lost so many.
            self.left_padding = mx.maximum(self.left_padding, 0) + extra
        self.offset = self.offset - mx.array(list(rejected))
        self.lengths = [n - one for n, one in zip(self.lengths, rejected, strict=True)]
        self._idx, self._offset = end, self._offset - common

    def filter(self, batch_indices: Many[int]) -> None:
        super().filter(mx.array(list(batch_indices)))
        self.lengths = [self.lengths[row] for row in batch_indices]

    def extend(self, other: "BatchRotatingKVCache") -> None:
        super().extend(other)
        self.lengths += other.lengths

    @classmethod
    def merge(cls, caches: Many[Any]) -> "BatchRotatingKVCache":
        merged: BatchRotatingKVCache = super().merge(caches)
        merged.lengths = [cache.offset for cache in caches]
        return merged


@lru_cache(maxsize=64)  # layers of a step share them
def _offsets(padding: tuple[int, ...], gaps: tuple[Gaps, ...], index: int) -> mx.array:
    pairs = zip(padding, gaps, strict=True)
    return mx.array([index - one - _width(others) for one, others in pairs])


def forget() -> None:
    """Free what was kept for the layers of one pass."""
    for kept in (_offsets, _mask_with_gaps, _sources):
        kept.cache_clear()


def _shortened(gaps: Gaps, end: int, count: int) -> tuple[Gaps, int]:
    """A row's gaps and where its tokens end, without the last `count` of those before `end`."""
    while gaps and end - gaps[-1][1] <= count:
        count -= end - gaps[-1][1]
        end, gaps = gaps[-1][0], gaps[:-1]
    return gaps, end - count


def _width(gaps: Gaps) -> int:
    return sum(end - start for start, end in gaps)


def _own(padding: int, gaps: Gaps, index: int) -> list[int]:
    """The places of a row's own tokens, of those before `index`."""
    ends = [start for start, _ in gaps]
    parts = zip((padding, *(end for _, end in gaps)), (*ends, index), strict=True)
    return list(itertools.chain.from_iterable(range(start, end) for start, end in parts))


@lru_cache(maxsize=4)
def _mask_with_gaps(
    padding: tuple[int, ...], gaps: tuple[Gaps, ...], index: int, tokens: int, window: int | None
) -> mx.array:
    """(rows, 1, tokens, keys) for the next `tokens` of rows that hold `index` with their gaps.

    A `window` counts a row's own tokens.
    """
    most = max(map(len, gaps))
    filled = mx.array([[*others, *[(0, 0)] * (most - len(others))] for others in gaps])
    keys = mx.arange(index + tokens)
    starts, ends = filled[:, :, :1], filled[:, :, 1:]
    in_gaps = mx.any((keys >= starts) & (keys < ends), axis=1)
    own = (keys >= mx.array(padding)[:, None]) & ~in_gaps
    seen = own[:, None, :] & (keys <= mx.arange(index, index + tokens)[:, None])
    if window is not None:
        place = mx.cumsum(own.astype(mx.int32), axis=1)
        seen &= place[:, index:, None] - place[:, None, :] < window
    return seen[:, None]


@lru_cache(maxsize=4)
def _sources(
    rows: tuple[int, ...],
    padding: tuple[int, ...],
    gaps: tuple[Gaps, ...],
    index: int,
    heads: int,
    size: int,
    new_size: int,
) -> mx.array:
    """(rows, heads, new_size): which of all rows' heads · size tokens each is to become."""
    own = [_own(one, others, index) for one, others in zip(padding, gaps, strict=True)]
    longest = max(map(len, own))
    places = [[0] * (longest - len(one)) + one + [0] * (new_size - longest) for one in own]
    starts = (mx.array(rows)[:, None] * heads + mx.arange(heads))[:, :, None] * size
    return starts + mx.array(places)[:, None, :]


def _own_tokens(
    rows: tuple[int, ...],
    padding: tuple[int, ...],
    gaps: tuple[Gaps, ...],
    index: int,
    x: mx.array,
    new_size: int,
) -> mx.array:
    """Of these rows of `x` (rows, heads, tokens, width), the tokens that are their own, ending
    together.
    """
    _, heads, size, width = x.shape
    return x.reshape(-1, width)[_sources(rows, padding, gaps, index, heads, size, new_size)]


def _written(held: mx.array | None, new: mx.array, start: int) -> mx.array:
    """`held` with `new` (rows, heads, tokens, width) after its first `start` tokens."""
    tokens = new.shape[2]
    if held is None or start + tokens > held.shape[2]:
        size = rounded(start - -tokens // STEP * STEP)
        space = mx.zeros((*new.shape[:2], size - start, new.shape[3]), new.dtype)
        held = space if held is None else mx.concatenate([held[:, :, :start], space], axis=2)
    held[:, :, start : start + tokens] = new
    return held


def _copy(x: mx.array, tokens: int, size: int) -> mx.array:
    """The first `tokens` of `x` (rows, heads, tokens, width), with room for `size`."""
    made = mx.zeros((*x.shape[:2], size, x.shape[3]), x.dtype)
    mx.eval(made, x)
    np.array(made, copy=False)[:, :, :tokens] = np.array(x, copy=False)[:, :, :tokens]
    return made


def _moved(x: mx.array, by: int, size: int) -> mx.array:
    """`x` (rows, heads, tokens, width) moved to the right along the tokens, cut to `size`."""
    x = x[:, :, max(0, -by) : size - by]
    left = max(0, by)
    right = size - left - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (left, right), (0, 0)]) if left or right else x


def _empty(like: Many[mx.array], rows: int, size: int) -> list[mx.array]:
    return [mx.zeros((rows, x.shape[1], size, x.shape[3]), x.dtype) for x in like]
