"""KV caches of prompts already computed, kept in blocks of tokens for requests that begin alike.

A block is named by a hash over its tokens and the name of the block before it, so that equal names
mean equal prefixes (as in vLLM's automatic prefix caching; Kwon et al. 2023 for the blocks). Blocks
are copies: a running request owns its cache, and dropping a block never harms it.
"""

import bisect
import hashlib
import itertools
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_server.engine.cache.disk import BlockRead, DiskCache
from mlx_server.engine.cache.layout import Cache, KvLayout

BLOCK = 32
"""Tokens of a block."""
LEAST_TAIL = 8
"""Tokens that the beginning of a block must have in common with a prompt to be worth taking."""
MOST_TAILS = 32
"""How many continuations of one block are searched for such a beginning."""
KEY_BYTES = 16
PUMP_BYTES = 32 << 20
"""What is handed to the disk in a turn, at most."""


@dataclass(slots=True, eq=False)
class Block:
    """The KV cache of `BLOCK` tokens after those of `parent`.

    `arrays` as `KvLayout.cut` gives them; `snapshot` as `KvLayout.snapshot` does, or None.
    `users` counts who is about to use it; it stays as long.
    """

    key: bytes
    parent: bytes
    tokens: list[int]
    arrays: list[mx.array]
    snapshot: list[mx.array] | None = None
    users: int = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays, *(self.snapshot or ())))


@dataclass(slots=True)
class Match:
    """The part of a prompt that need not be computed: its first `length` tokens."""

    blocks: list[Block] = field(default_factory=list)
    length: int = 0


class PrefixCache:
    """The blocks in memory, least recently used first, and the disk's behind them.

    `limit` is in bytes and may change at any time, by `resize`.
    """

    def __init__(self, layout: KvLayout, limit: int, disk: DiskCache | None = None) -> None:
        self.layout = layout
        self.limit = limit
        self.disk = disk
        self.nbytes = 0
        # Parents come after their children, so that dropping from the front never orphans a block.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._children: dict[bytes, list[Block]] = {}
        self._computing: list[Block] = []
        self._unwritten: deque[Block] = deque()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def capacity(self) -> int:
        """How many blocks the limit holds, snapshots aside."""
        return self.limit // max(1, BLOCK * self.layout.bytes_per_token)

    def match(self, prompt: list[int], keys: list[bytes]) -> Match:
        """The longest cached prefix of `prompt` that leaves at least its last token to compute.

        `keys` are the names of the prompt's usable blocks, as `extend_keys` gives them.
        """
        found = self.chain(keys)
        if not self.layout.sliceable:
            while found and found[-1].snapshot is None:
                found.pop()
            return Match(found, len(found) * BLOCK)
        length = len(found) * BLOCK
        tail, common = self._tail(found[-1].key if found else b"", prompt[length:-1])
        return Match([*found, tail] if tail else found, length + common)

    def fill(self, cache: Cache, match: Match) -> None:
        """Put the tokens of `match` into `cache`, which is new."""
        if match.blocks:
            arrays = [block.arrays for block in match.blocks]
            self.layout.assemble(cache, arrays, match.length, match.blocks[-1].snapshot)
            self._touch(match.blocks)
            if self.disk is not None:
                self.disk.touch([block.key for block in match.blocks])

    def chain(self, keys: Many[bytes]) -> list[Block]:
        """The blocks named `keys`, from the first on, as far as they are in memory."""
        return [self._blocks[key] for key in keys[: self.known(keys)]]

    def known(self, keys: Many[bytes]) -> int:
        """How many of the blocks named `keys`, from the first on, are in memory."""
        # No block is there without those before it.
        return bisect.bisect_left(range(len(keys)), True, key=lambda i: keys[i] not in self._blocks)

    def store(
        self,
        tokens: list[int],
        keys: Many[bytes],
        cache: Cache,
        row: int,
        padding: int,
    ) -> list[mx.array]:
        """Copy those of the blocks `keys` of a row that are not in memory yet.

        `tokens` are the row's, `padding` is where it begins in the cache's arrays. Returns what is
        to be evaluated before the cache is next written to.
        """
        known = self.chain(keys)
        count = min(len(keys), self.capacity) - len(known)
        if count <= 0:
            return []
        start = len(known)
        pieces = self.layout.cut(cache, row, padding + start * BLOCK, BLOCK, count)
        new = [
            Block(keys[i], keys[i - 1] if i else b"", tokens[i * BLOCK : (i + 1) * BLOCK], arrays)
            for i, arrays in enumerate(pieces, start)
        ]
        for block in new:
            self._add(block)
        if self.disk is not None:
            self._computing += new
        self._touch([*known, *new])
        self.shrink(self.limit)
        return [array for block in new for array in block.arrays]

    def store_snapshot(self, key: bytes, cache: Cache) -> list[mx.array]:
        """Keep the state of the layers that cannot be sliced, as it is after block `key`.

        Returns what is to be evaluated before the cache is next written to.
        """
        block = self._blocks.get(key)
        if block is None or block.snapshot is not None:
            return []
        self.nbytes -= block.nbytes
        block.snapshot = self.layout.snapshot(cache)
        self.nbytes += block.nbytes
        self.shrink(self.limit)
        return block.snapshot

    def pin(self, blocks: Iterable[Block]) -> None:
        """Keep these blocks, whatever else needs room, until `unpin`."""
        for block in blocks:
            block.users += 1

    def unpin(self, blocks: Iterable[Block]) -> None:
        """Undo `pin`."""
        for block in blocks:
            block.users -= 1

    def resize(self, limit: int) -> None:
        """Keep to `limit` bytes from now on."""
        self.limit = limit
        self.shrink(limit)

    def shrink(self, limit: int) -> None:
        """Drop the least recently used blocks until what is left takes at most `limit` bytes."""
        excess = self.nbytes - limit
        victims = []
        for block in self._blocks.values():
            if excess <= 0:
                break
            if not block.users:
                victims.append(block)
                excess -= block.nbytes
        for block in victims:
            self._drop(block)

    def clear(self) -> None:
        """Forget every block in memory, also those on their way to the disk."""
        self._blocks.clear()
        self._children.clear()
        self._computing.clear()
        self._unwritten.clear()
        self.nbytes = 0

    # the disk

    def on_disk(self, keys: list[bytes]) -> list[bytes]:
        """Those of a prompt's blocks beyond what is in memory that the disk has, from the first."""
        if self.disk is None:
            return []
        missing = keys[self.known(keys) : self.capacity]
        return list(itertools.takewhile(self.disk.holds, missing))

    def read(self, wanted: list[bytes]) -> BlockRead:
        """Begin to read what `on_disk` has found."""
        assert self.disk is not None
        return self.disk.read(wanted)

    def load_blocks(self, prompt: list[int], keys: list[bytes], read: BlockRead) -> None:
        """Add the blocks that were read of a prompt."""
        position = {key: i for i, key in enumerate(keys)}
        groups = self.layout.groups
        for key, arrays in zip(read.keys, read.blocks(), strict=False):
            i = position[key]
            parent = keys[i - 1] if i else b""
            if key not in self._blocks and (not parent or parent in self._blocks):
                tokens = prompt[i * BLOCK : (i + 1) * BLOCK]
                self._add(Block(key, parent, tokens, arrays[:groups], arrays[groups:] or None))
        self._touch(self.chain(keys))
        self.shrink(self.limit)

    def settle(self) -> None:
        """Hand everything stored so far to the disk; for when nothing runs."""
        self._unwritten.extend(self._computing)
        self._computing = []
        self._write(sum(block.nbytes for block in self._unwritten))

    def close(self) -> None:
        """Finish writing."""
        self.settle()
        if self.disk is not None:
            self.disk.close()

    def pump(self) -> None:
        """Hand to the disk, once a turn, what was stored before the last call.

        It has been computed since. A device with memory of its own has to copy it first, so this is
        bounded.
        """
        self._write(PUMP_BYTES)
        self._unwritten.extend(self._computing)
        self._computing = []

    def _write(self, nbytes: int) -> None:
        while self.disk is not None and self._unwritten and nbytes > 0:
            block = self._unwritten.popleft()
            self.disk.write(block.key, [*block.arrays, *(block.snapshot or ())])
            nbytes -= block.nbytes

    # blocks

    def _tail(self, parent: bytes, rest: list[int]) -> tuple[Block | None, int]:
        """The block after `parent` that begins most like `rest`, and how many tokens agree."""
        best, most = None, LEAST_TAIL - 1
        for block in self._children.get(parent, [])[-MOST_TAILS:]:
            common = common_prefix(block.tokens, rest)
            if common > most:
                best, most = block, common
        return best, most if best else 0

    def _add(self, block: Block) -> None:
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, []).append(block)
        self.nbytes += block.nbytes

    def _drop(self, block: Block) -> None:
        del self._blocks[block.key]
        self.nbytes -= block.nbytes
        siblings = self._children[block.parent]
        siblings.remove(block)
        if not siblings:
            del self._children[block.parent]

    def _touch(self, chain: Many[Block]) -> None:
        """Make these blocks the most recently used, the first of the chain most of all."""
        for block in reversed(chain):
            if block.key in self._blocks:
                self._blocks.move_to_end(block.key)


def extend_keys(keys: list[bytes], tokens: list[int]) -> None:
    """Append to `keys` the names of the whole blocks of `tokens` that it does not have yet."""
    for start in range(len(keys) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=KEY_BYTES)
        digest.update(array("I", tokens[start : start + BLOCK]).tobytes())
        keys.append(digest.digest())


def usable_blocks(prompt: list[int]) -> int:
    """How many whole blocks of a prompt a cache may answer for: its last token is computed."""
    return (len(prompt) - 1) // BLOCK


def common_prefix(one: Many[object], other: Many[object]) -> int:
    """How many items two sequences have in common from the first on."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_blocks(one: Many[bytes], other: Many[bytes]) -> int:
    """How many blocks two prompts have in common; equal names mean equal prefixes."""
    shorter = range(min(len(one), len(other)))
    return bisect.bisect_left(shorter, True, key=lambda i: one[i] != other[i])
