"""Several prompts at once without padding, for models that compute none rightly."""

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.run import even
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.prefill import cache_of
from mlx_server.engine.run.store import store_blocks
from mlx_server.engine.sequence import Sequence


class EvenPrefill:
    """One chunk, in passes that each go to where the shortest of the prompts left ends."""

    until: int | None = None
    mixes = False

    def __init__(self, model: Backend, prefix: PrefixCache, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        begun = [cache_of(model, prefix, sequence) for sequence in sequences]
        self.position = 0
        self._caches = [cache for cache, _ in begun]
        self._starts = [start for _, start in begun]
        self._ends = [len(sequence.request.prompt) - 1 for sequence in sequences]
        spans = zip(self._starts, self._ends, strict=True)
        self._missing = [end - start for start, end in spans]
        self.length = max(self._missing)
        self._model = model
        self._prefix = prefix

    @property
    def cache(self) -> Cache:
        return [layer for cache in self._caches for layer in cache]

    def size(self, budget: int) -> tuple[int, float]:
        tokens, rows = sum(self._missing), len(self.sequences)
        return tokens, (sum(self._starts) + tokens / 2) / rows

    def advance(self, budget: int) -> None:
        if self.position >= self.length:
            return
        for start in set(self._starts):
            self._compute([i for i, one in enumerate(self._starts) if one == start], start)
        self.position = self.length
        rows = zip(self.sequences, self._caches, self._ends, strict=True)
        mx.eval([store_blocks(self._prefix, s, cache, 0, end) for s, cache, end in rows])

    def batch_cache(self) -> Cache:
        return self._model.caches.merge(self._caches)

    def _compute(self, rows: list[int], position: int) -> None:
        """Prompts `rows` from `position` on."""
        cache = even.merge([self._caches[row] for row in rows])
        while rows:
            end = min(self._ends[row] for row in rows)
            if end > position:
                prompts = (self.sequences[row].request.prompt for row in rows)
                self._model.prefill(mx.array([prompt[position:end] for prompt in prompts]), cache)
            for place, row in enumerate(rows):
                if self._ends[row] == end:
                    self._caches[row] = even.keep_rows(cache, [place])
            staying = [place for place, row in enumerate(rows) if self._ends[row] > end]
            cache = even.keep_rows(cache, staying)
            rows, position = [rows[place] for place in staying], end
