"""The KV-cache blocks in memory: names, order of use, bytes and pins.

Equal names mean equal prefixes (vLLM's automatic prefix caching; Kwon et al. 2023 for the blocks).
"""

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import mlx.core as mx

LEAST_TAIL = 8
"""Tokens that a block's beginning must share with a prompt to be worth taking."""
MOST_TAILS = 32
"""How many continuations of one block are searched for such a beginning."""


@dataclass(slots=True, eq=False)
class Block:
    """The KV cache of `tokens`, after block `parent` (b"" for a prompt's first).

    `arrays` from `KvLayout.cut`, `snapshot` from `KvLayout.snapshot`. Pinned blocks stay in memory.
    `reused`: has served another prompt than the one that made it.
    """

    key: bytes
    parent: bytes
    tokens: list[int]
    arrays: list[mx.array]
    snapshot: list[mx.array] | None = None
    pins: int = 0
    reused: bool = False

    @property
    def content(self) -> list[mx.array]:
        return [*self.arrays, *(self.snapshot or ())]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.content)


@dataclass(frozen=True, slots=True)
class Charge:
    """Bytes that blocks and snapshots count for, whatever they take: the same in ranks that have
    other layers, so that all keep the same blocks.
    """

    block: int
    snapshot: int

    def of(self, block: Block) -> int:
        return self.block + (self.snapshot if block.snapshot is not None else 0)


def _size(block: Block) -> int:
    return block.nbytes


class BlockIndex:
    """Blocks by name, least recently used first. `size`: the bytes that one counts for."""

    def __init__(self, size: Callable[[Block], int] = _size) -> None:
        self.nbytes = 0
        self._size = size
        # Parents come after their children, so that dropping from the front never orphans a block.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._children: dict[bytes, list[Block]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def get(self, key: bytes) -> Block | None:
        return self._blocks.get(key)

    def known(self, keys: Many[bytes]) -> int:
        """How many leading `keys` of a prompt are here."""
        # No block is here without those before it.
        return bisect.bisect_left(range(len(keys)), True, key=lambda i: keys[i] not in self._blocks)

    def chain(self, keys: Many[bytes]) -> list[Block]:
        return [self._blocks[key] for key in keys[: self.known(keys)]]

    def tail(self, parent: bytes, rest: list[int]) -> tuple[Block | None, int]:
        """The child that begins most like `rest`, and the tokens that agree."""
        best, most = None, LEAST_TAIL - 1
        for block in self._children.get(parent, [])[-MOST_TAILS:]:
            common = common_prefix(block.tokens, rest)
            if common > most:
                best, most = block, common
        return best, most if best else 0

    def add(self, block: Block) -> None:
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, []).append(block)
        self.nbytes += self._size(block)

    def add_snapshot(self, block: Block, snapshot: list[mx.array]) -> None:
        self.nbytes -= self._size(block)
        block.snapshot = snapshot
        self.nbytes += self._size(block)

    def touch(self, chain: Many[Block]) -> None:
        """Most recently used from now on, the first of the chain most of all."""
        for block in reversed(chain):
            if block.key in self._blocks:
                self._blocks.move_to_end(block.key)

    def pin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.pins += 1

    def unpin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.pins -= 1

    def newest_first(self) -> list[Block]:
        """All blocks, each after its parent, the most recently used prompts' first."""
        return list(reversed(self._blocks.values()))

    def shrink(self, limit: int) -> list[Block]:
        """Drop and return the least recently used blocks beyond `limit` bytes."""
        excess = self.nbytes - limit
        victims = []
        for block in self._blocks.values():
            if excess <= 0:
                break
            if not block.pins:
                victims.append(block)
                excess -= self._size(block)
        for block in victims:
            self._drop(block)
        return victims

    def clear(self) -> None:
        self._blocks.clear()
        self._children.clear()
        self.nbytes = 0

    def _drop(self, block: Block) -> None:
        del self._blocks[block.key]
        self.nbytes -= self._size(block)
        siblings = self._children[block.parent]
        siblings.remove(block)
        if not siblings:
            del self._children[block.parent]


def common_prefix(one: Many[object], other: Many[object]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
