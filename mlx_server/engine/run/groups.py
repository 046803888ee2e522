"""Rows of the decoding batch in groups, each with a cache of its own."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.protocol import Batching, Sharing
from mlx_server.engine.run import kv
from mlx_server.engine.run.batching import RowCaches
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.store import CachedRow, store_blocks
from mlx_server.engine.sequence import Sequence

MOST_PADDED = 2
"""How many times longer than another a sequence in the same group may be."""
SHORT = 256
"""Tokens; sequences up to this length go together whatever their lengths."""


def alike(shortest: int, longest: int) -> bool:
    """Whether sequences of these lengths in tokens may share a cache."""
    return longest <= max(SHORT, MOST_PADDED * shortest)


def most_padded(length: int) -> int:
    """The most tokens to which a sequence of `length` tokens may be padded in its group."""
    return length + max(SHORT, (MOST_PADDED - 1) * length)


def padded(sharing: Sharing, *, mixes: bool) -> Callable[[list[int]], list[int]]:
    """From the lengths of sequences to what they may be padded to in their groups."""

    def to_longest(lengths: list[int]) -> list[int]:
        return [max(lengths, default=0)] * len(lengths)

    def within_groups(lengths: list[int]) -> list[int]:
        longest = max(lengths, default=0)
        return [min(longest, most_padded(length)) for length in lengths]

    if sharing is not Sharing.ANY:
        return list
    return within_groups if mixes else to_longest


class Cached(Protocol):
    """What computes rows that have caches, a `Backend` or a `Head`."""

    @property
    def mixes(self) -> bool: ...
    @property
    def batching(self) -> Batching: ...
    @property
    def caches(self) -> RowCaches: ...


Row = TypeVar("Row", bound=CachedRow)


@dataclass
class Group(Generic[Row]):
    """Rows that share a batch cache, in which all are padded to the longest."""

    rows: list[Row]
    cache: Cache

    @property
    def lengths(self) -> tuple[int, int]:
        lengths = [row.computed for row in self.rows]
        return min(lengths), max(lengths)

    def suits(self, other: "Group[Row]") -> bool:
        """Whether the two should be one, considering what padding costs."""
        (low, high), (others_low, others_high) = self.lengths, other.lengths
        return alike(min(low, others_low), max(high, others_high))

    def equals(self, other: "Group[Row]") -> bool:
        """Whether the rows of both are equally long, as those of each are."""
        return self.lengths == other.lengths


class Groups(Generic[Row]):
    """All rows of the batch by group.

    Several groups cost a pass each where the model cannot mix them in one. Then there is one group,
    or as many as it takes for rows of each to be equally long, or one for each row. `prefix` keeps
    blocks of rows that leave.
    """

    def __init__(self, model: Cached, prefix: PrefixCache | None) -> None:
        self._mixes = model.mixes
        self._sharing = model.batching.decode
        self._caches = model.caches
        self._prefix = prefix
        self._groups: list[Group[Row]] = []
        self.rows: list[Row] = []

    @property
    def nbytes(self) -> int:
        return sum(kv.cache_bytes(group.cache) for group in self._groups)

    def add(self, rows: list[Row], cache: Cache) -> int:
        new = Group(rows, cache)
        group = self._group_for(new)
        if group is None:
            self._groups.append(new)
            place = len(self.rows)
        else:
            before = self._groups[: self._groups.index(group) + 1]
            place = sum(len(one.rows) for one in before)
            group.rows += new.rows
            group.cache = self._caches.extend(group.cache, new.cache)
        self._renumber()
        return place

    def remove(self, ids: frozenset[int]) -> list[int]:
        """Drop these rows, whole blocks of which the prefix cache keeps; returns who stays."""
        keep = [i for i, row in enumerate(self.rows) if row.id not in ids]
        if len(keep) < len(self.rows):
            for group in self._groups:
                self._shrink(group, ids)
            self._groups = [group for group in self._groups if group.rows]
            self._renumber()
        return keep

    def parts(self, inputs: mx.array) -> Iterator[Part]:
        start = 0
        for group in self._groups:
            end = start + len(group.rows)
            yield Part(inputs[start:end, None], group.cache)
            start = end

    def members(self) -> Iterator[tuple[list[Row], Cache]]:
        for group in self._groups:
            yield group.rows, group.cache

    def roll_back(self, rejected: dict[int, int]) -> None:
        """Forget so many of the last tokens of each row, by its id."""
        for group in self._groups:
            counts = [rejected[row.id] for row in group.rows]
            if any(counts):
                kv.roll_back(group.cache, counts)

    def go_back(self, undone: dict[int, int], before: list[list[list[mx.array | None]]]) -> None:
        """Forget so many of the last tokens of each row, all that were computed since its group's
        layers had the states `before`, or none.
        """
        for group, states in zip(self._groups, before, strict=True):
            counts = [undone[row.id] for row in group.rows]
            if any(counts):
                kv.roll_back(group.cache, counts)
                kv.put_back(group.cache, states, [count > 0 for count in counts])

    def loose_ends(self) -> list[mx.array]:
        """What a step leaves unevaluated, and would add to for ever."""
        return [array for group in self._groups for array in kv.loose_ends(group.cache)]

    def _group_for(self, new: Group[Row]) -> Group[Row] | None:
        match self._sharing:
            case Sharing.NONE:
                fitting: Iterator[Group[Row]] = iter(())
            case Sharing.EQUAL:
                fitting = (group for group in self._groups if group.equals(new))
            case Sharing.ANY:
                fitting = (one for one in self._groups if not self._mixes or one.suits(new))
        return next(fitting, None)

    def _shrink(self, group: Group[Row], ids: frozenset[int]) -> None:
        keep = [i for i, row in enumerate(group.rows) if row.id not in ids]
        if len(keep) == len(group.rows):
            return
        if self._prefix is not None:
            leaving = [i for i, row in enumerate(group.rows) if row.id in ids]
            _keep_blocks(self._prefix, group, leaving)
        group.rows = [group.rows[i] for i in keep]
        group.cache = self._caches.keep_rows(group.cache, keep)

    def _renumber(self) -> None:
        self.rows = [row for group in self._groups for row in group.rows]


def _keep_blocks(prefix: PrefixCache, group: Group[Row], leaving: list[int]) -> None:
    cache, places = group.cache, leaving
    if kv.has_gaps(cache):
        cache, places = kv.copy_of_rows(cache, leaving), list(range(len(leaving)))
    for i, place in zip(leaving, places, strict=True):
        row = group.rows[i]
        kept = store_blocks(prefix, row, cache, place, row.computed)
        mx.async_eval(kept)  # type: ignore[no-untyped-call]


def ids_of(rows: Many[Sequence]) -> frozenset[int]:
    return frozenset(row.id for row in rows)
