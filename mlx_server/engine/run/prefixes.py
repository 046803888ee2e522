"""What waiting requests have in the prefix cache: blocks on their way from the disk, and pins."""

from collections.abc import Iterable

from mlx_server.engine.cache.blocks import Block
from mlx_server.engine.cache.disk import BlockRead
from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.plan import Fetch
from mlx_server.engine.ranks.sharing import Ranks

READ_SECONDS = 10.0
"""For the disk of a rank to read what rank 0's has read."""


class WaitingPrefixes:
    """`reads` are by request id. Pinned blocks stay until their request begins or is dropped."""

    def __init__(self, prefix: PrefixCache, ranks: Ranks) -> None:
        self.reads: dict[int, BlockRead] = {}
        self._prefix = prefix
        self._ranks = ranks
        self._fetches: dict[int, Fetch] = {}
        self._pinned: dict[int, list[Block]] = {}

    def fetch(self, fetches: Iterable[Fetch]) -> None:
        for fetch in fetches:
            self._fetches[fetch.id] = fetch
            self.reads[fetch.id] = self._prefix.disk.read(fetch.wanted)

    def load(self, ids: Iterable[int]) -> None:
        """Put what was read for these requests into the prefix cache, and pin it: as much as all
        ranks have read.
        """
        for id_ in ids:
            fetch, read = self._fetches.pop(id_), self.reads.pop(id_)
            if not read.wait(READ_SECONDS):
                read.cancel()
            found = self._ranks.least(len(read.found))
            self._prefix.load_blocks(fetch.prompt, fetch.keys, read, found)
            self.pin(id_, fetch.keys)

    def drop(self, id_: int) -> None:
        self.unpin(id_)
        self._fetches.pop(id_, None)
        if (read := self.reads.pop(id_, None)) is not None:
            read.cancel()

    def pin(self, id_: int, keys: list[bytes]) -> None:
        """Keep the blocks `keys`, as far as they are in memory, for a request."""
        self.unpin(id_)
        self._pinned[id_] = self._prefix.pin(keys)

    def unpin(self, id_: int) -> None:
        self._prefix.unpin(self._pinned.pop(id_, ()))

    def clear(self) -> None:
        """Forget all pins, since the prefix cache has been cleared."""
        self._pinned.clear()
