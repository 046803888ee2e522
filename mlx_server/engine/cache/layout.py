"""How a model's KV caches are cut into blocks of tokens, and put together again.

Layers that grow with the tokens are sliced. Layers with a window or a recurrent state cannot be:
their whole state at a block's end is kept as a snapshot.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
)

Cache = list[Any]
"""One mlx-lm cache object per layer."""


def leaves(cache: Cache) -> list[Any]:
    return [
        leaf
        for layer in cache
        for leaf in (leaves(layer.caches) if isinstance(layer, CacheList) else [layer])
    ]


class KvLayout:
    """Learned from a cache of one sequence that holds a token; `everywhere` asks whether something
    holds for the caches of all ranks.

    `obstacle` names a kind of cache that can be neither sliced nor kept whole. `sliceable`: no
    snapshots are needed.
    """

    def __init__(self, cache: Cache, everywhere: Callable[[bool], bool] = bool) -> None:
        parts = leaves(cache)
        self.obstacle: str | None = None
        self._sliced: list[int] = []
        self._whole: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, KVCache):
                self._sliced.append(index)
            elif isinstance(part, RotatingKVCache | ArraysCache):
                self._whole.append(index)
            else:
                self.obstacle = type(part).__name__
        if not everywhere(self.obstacle is None):
            self.obstacle = self.obstacle or "another rank's cache"
        self.sliceable = everywhere(not self._whole)
        # Arrays of one shape and type travel stacked: some copies instead of hundreds.
        self._groups: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for index in self._sliced:
            for position, array in enumerate(token_arrays(parts[index])):
                shape = (array.shape[1], array.shape[3], array.dtype)
                self._groups.setdefault(shape, []).append((index, position))

        self.bytes_per_token: int = sum(
            len(members) * heads * width * dtype.size
            for (heads, width, dtype), members in self._groups.items()
        )

    @property
    def groups(self) -> int:
        return len(self._groups)

    def describe(self) -> str:
        """Differs whenever blocks of one layout do not fit the other."""
        groups = [(*map(str, shape), len(members)) for shape, members in self._groups.items()]
        return f"{groups} {self._sliced} {self._whole}"

    def padding(self, cache: Cache, length: int) -> int:
        """Where in its arrays a row of `length` tokens begins; rows end together."""
        parts = leaves(cache)
        return int(parts[self._sliced[0]].size()) - length if self._sliced else 0

    def cut(
        self, cache: Cache, row: int, start: int, size: int, count: int
    ) -> list[list[mx.array]]:
        """`count` blocks of `size` tokens of a row, from array position `start`.

        A block is an unevaluated array (parts, heads, size, width) per group, in its own buffer.
        """
        parts = leaves(cache)
        stop = start + size * count
        stacks = [
            mx.stack([token_arrays(parts[i])[p][row, :, start:stop] for i, p in members])
            for members in self._groups.values()
        ]
        return [
            [mx.contiguous(stack[:, :, at : at + size]) for stack in stacks]
            for at in range(0, size * count, size)
        ]

    def snapshot(self, cache: Cache) -> list[mx.array]:
        parts = leaves(cache)
        arrays: list[mx.array] = []
        numbers: list[int] = []
        for index in self._whole:
            own, facts = _state(parts[index])
            # New handles: the cache goes on to write to its own.
            arrays += [mx.array(array) for array in own]
            numbers += facts
        return [*arrays, mx.array(numbers, dtype=mx.int32)]

    def assemble(
        self,
        cache: Cache,
        blocks: Many[list[mx.array]],
        length: int,
        snapshot: Many[mx.array] | None,
    ) -> None:
        """Fill a new `cache` with the first `length` tokens of `blocks`.

        `snapshot` is the one taken at `length`; None where the model needs none.
        """
        parts = leaves(cache)
        arrays: dict[tuple[int, int], mx.array] = {}
        for number, members in enumerate(self._groups.values()):
            joined = mx.concatenate([block[number] for block in blocks], axis=2)
            for position, member in enumerate(members):
                arrays[member] = joined[position : position + 1, :, :length]
        for index in self._sliced:
            own = [arrays[member] for member in sorted(arrays) if member[0] == index]
            put_arrays(parts[index], own)
            parts[index].offset = length
        if snapshot is not None:
            self._restore([parts[index] for index in self._whole], snapshot)

    def _restore(self, parts: list[Any], snapshot: Many[mx.array]) -> None:
        *arrays, facts = snapshot
        numbers = cast(list[int], facts.tolist())
        for part in parts:
            if isinstance(part, RotatingKVCache):
                own, numbers = numbers[:4], numbers[4:]
                part.state = (mx.array(arrays.pop(0)), mx.array(arrays.pop(0)), *own)
            else:
                present, numbers = numbers[: len(part.cache)], numbers[len(part.cache) :]
                part.cache = [mx.array(arrays.pop(0)) if there else None for there in present]


def token_arrays(part: KVCache | BatchKVCache) -> list[mx.array]:
    """Keys, then values, of all that a cache has room for: (rows, heads, tokens, width) each."""
    arrays: list[mx.array] = []
    for side in (part.keys, part.values) if part.keys is not None else ():
        arrays += [side] if isinstance(side, mx.array) else side
    return arrays


def put_arrays(part: KVCache | BatchKVCache, arrays: list[mx.array]) -> None:
    """As `token_arrays` gave them, or of another size."""
    half = len(arrays) // 2
    if half == 1:
        part.keys, part.values = arrays
    elif half > 1:
        part.keys, part.values = tuple(arrays[:half]), tuple(arrays[half:])


def _state(part: RotatingKVCache | ArraysCache) -> tuple[list[mx.array], list[int]]:
    if isinstance(part, RotatingKVCache):
        keys, values, *numbers = part.state
        return [keys, values], numbers
    return (
        [array for array in part.cache if array is not None],
        [int(array is not None) for array in part.cache],
    )
