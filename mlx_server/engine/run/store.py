"""From sequences' caches to the prefix cache, and from arrays of log-probabilities to entries."""

from typing import Protocol, cast

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import BLOCK, PrefixCache, extend_keys
from mlx_server.engine.protocol import Logprobs


class CachedRow(Protocol):
    """A request in a cache; `keys` names the blocks of its tokens."""

    id: int
    prompt: list[int]
    completion: list[int]
    keys: list[bytes]

    @property
    def computed(self) -> int:
        """Tokens in the cache."""


def store_blocks(
    prefix: PrefixCache, sequence: CachedRow, cache: Cache, row: int, computed: int
) -> list[mx.array]:
    """Keep the whole blocks of a row of `cache` that holds `computed` tokens of `sequence`.

    Returns what is to be evaluated before the cache is next written to.
    """
    tokens = sequence.prompt + sequence.completion
    extend_keys(sequence.keys, tokens)
    keys = sequence.keys[: min(computed, len(tokens)) // BLOCK]
    return prefix.store(tokens, keys, cache, row, prefix.layout.padding(cache, computed))


def logprob_entries(tokens: list[int], read: tuple[mx.array, ...]) -> list[Logprobs]:
    """What `token_logprobs` returned for `tokens`, position by position."""
    chosen = cast(list[float], read[0].tolist())
    tops: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if len(read) > 1:
        ids = cast(list[list[int]], read[1].tolist())
        values = cast(list[list[float]], read[2].tolist())
        tops = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [Logprobs(*entry) for entry in zip(tokens, chosen, tops, strict=True)]
