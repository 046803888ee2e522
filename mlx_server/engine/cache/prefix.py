"""KV caches of computed prompts, in blocks of tokens, for requests that share a prefix.

A block's name hashes its tokens and its parent's name. Blocks are copies: dropping one never harms
a running request.
"""

import bisect
import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_server.engine.cache.blocks import Block, BlockIndex, Charge
from mlx_server.engine.cache.disk import BlockRead, DiskCache
from mlx_server.engine.cache.disk_tier import DiskTier
from mlx_server.engine.cache.layout import Cache, KvLayout
from mlx_server.engine.idle import Chore

BLOCK = 32
"""Tokens of a block."""
KEY_BYTES = 16
SAVE_USED_SECONDS, SAVE_ALL_SECONDS = 5.0, 60.0
"""Idle time after which prefixes go to the disk: those used more than once, and all others."""


@dataclass(slots=True)
class Match:
    blocks: list[Block] = field(default_factory=list)
    length: int = 0


class PrefixCache:
    """Blocks in memory, at most `limit` bytes, and the `disk` behind. `charge`: what they count
    for, if not their bytes.
    """

    def __init__(
        self,
        layout: KvLayout,
        limit: int,
        disk: DiskCache | None = None,
        charge: Charge | None = None,
    ) -> None:
        self.layout = layout
        self.limit = limit
        self.disk = DiskTier(disk)
        self._block_bytes = charge.block if charge else BLOCK * layout.bytes_per_token
        self._blocks = BlockIndex(charge.of) if charge else BlockIndex()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    @property
    def capacity(self) -> int:
        """In blocks, snapshots aside."""
        return self.limit // max(1, self._block_bytes)

    def known(self, keys: Many[bytes]) -> int:
        """How many leading blocks are in memory."""
        return self._blocks.known(keys)

    def on_disk(self, keys: list[bytes]) -> list[bytes]:
        """The blocks that the disk has next after those in memory."""
        return self.disk.leading(keys[self.known(keys) : self.capacity])

    def match(self, prompt: list[int], keys: list[bytes]) -> Match:
        """The longest cached prefix that leaves at least the last token to compute.

        `keys` name the prompt's usable blocks.
        """
        found = self._blocks.chain(keys)
        if not self.layout.sliceable:
            while found and found[-1].snapshot is None:
                found.pop()
            return Match(found, len(found) * BLOCK)
        length = len(found) * BLOCK
        tail, common = self._blocks.tail(found[-1].key if found else b"", prompt[length:-1])
        return Match([*found, tail] if tail else found, length + common)

    def fill(self, cache: Cache, match: Match) -> None:
        if match.blocks:
            arrays = [block.arrays for block in match.blocks]
            self.layout.assemble(cache, arrays, match.length, match.blocks[-1].snapshot)
            for block in match.blocks:
                block.reused = True
            self._blocks.touch(match.blocks)
            self.disk.touch(match.blocks)

    def store(
        self,
        tokens: list[int],
        keys: Many[bytes],
        cache: Cache,
        row: int,
        padding: int,
    ) -> list[mx.array]:
        """Copy those blocks `keys` of a row that are not in memory yet.

        `padding` is where the row begins in the cache's arrays. Returns what to evaluate before the
        cache is next written to.
        """
        known = self._blocks.chain(keys)
        count = min(len(keys), self.capacity) - len(known)
        if count <= 0:
            return []
        start = len(known)
        pieces = self.layout.cut(cache, row, padding + start * BLOCK, BLOCK, count)
        new = [_block(tokens, keys, i, arrays) for i, arrays in enumerate(pieces, start)]
        for block in new:
            self._blocks.add(block)
        self._blocks.touch([*known, *new])
        self._shrink()
        return [array for block in new for array in block.arrays]

    def store_snapshot(self, key: bytes, cache: Cache) -> list[mx.array]:
        """Keep the unsliceable layers' state after block `key`; returns as `store`."""
        block = self._blocks.get(key)
        if block is None or block.snapshot is not None:
            return []
        snapshot = self.layout.snapshot(cache)
        self._blocks.add_snapshot(block, snapshot)
        self._shrink()
        return snapshot

    def load_blocks(
        self, prompt: list[int], keys: list[bytes], read: BlockRead, count: int
    ) -> None:
        """Keep the first `count` blocks that were found on disk, of those `keys` of a `prompt`."""
        position = {key: i for i, key in enumerate(keys)}
        groups = self.layout.groups
        for key, arrays in zip(read.keys, read.blocks(count), strict=False):
            block = _block(prompt, keys, position[key], arrays[:groups], arrays[groups:] or None)
            if key not in self._blocks and (not block.parent or block.parent in self._blocks):
                self._blocks.add(block)
        self._blocks.touch(self._blocks.chain(keys))
        self._shrink()

    def pin(self, keys: Many[bytes]) -> list[Block]:
        blocks = self._blocks.chain(keys)
        self._blocks.pin(blocks)
        return blocks

    def unpin(self, blocks: Iterable[Block]) -> None:
        self._blocks.unpin(blocks)

    def resize(self, limit: int) -> None:
        self.limit = limit
        self._shrink()

    def chores(self) -> list[Chore]:
        """For idle time."""
        return [Chore(SAVE_USED_SECONDS, self.save_used), Chore(SAVE_ALL_SECONDS, self.save_all)]

    def save_used(self) -> float | None:
        """Idle: write what has been of use and is not on disk; returns when to go on."""
        return self.disk.save(block for block in self._blocks.newest_first() if block.reused)

    def save_all(self) -> float | None:
        """Idle: write everything that is not on disk; returns when to go on."""
        return self.disk.save(self._blocks.newest_first())

    def clear(self) -> None:
        self._blocks.clear()
        self.disk.clear()

    def close(self) -> None:
        self.disk.close(self._blocks.newest_first())

    def _shrink(self) -> None:
        self.disk.rescue(self._blocks.shrink(self.limit))


def extend_keys(keys: list[bytes], tokens: list[int]) -> None:
    """Append the missing names of whole blocks of `tokens`."""
    for start in range(len(keys) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=KEY_BYTES)
        digest.update(array("I", tokens[start : start + BLOCK]).tobytes())
        keys.append(digest.digest())


def usable_blocks(prompt: list[int]) -> int:
    """Whole blocks that a cache may serve: the last token is always computed."""
    return (len(prompt) - 1) // BLOCK


def common_blocks(one: Many[bytes], other: Many[bytes]) -> int:
    """How many leading blocks two prompts share."""
    shorter = range(min(len(one), len(other)))
    return bisect.bisect_left(shorter, True, key=lambda i: one[i] != other[i])


def _block(
    tokens: list[int],
    keys: Many[bytes],
    i: int,
    arrays: list[mx.array],
    snapshot: list[mx.array] | None = None,
) -> Block:
    parent = keys[i - 1] if i else b""
    return Block(keys[i], parent, tokens[i * BLOCK : (i + 1) * BLOCK], arrays, snapshot)
