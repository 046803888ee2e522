"""Prompts on their way into a cache: a long one in chunks, or several short ones at once.

What the prefix cache has of a prompt is not computed again. A prompt's last token is left for the
decoding batch, whose next step then gives the first token of the completion.
"""

from typing import Protocol

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import BLOCK, Match, PrefixCache
from mlx_server.engine.run import kv
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.batching import prefill_padded
from mlx_server.engine.run.heads.unread import HELD
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.store import logprob_entries, store_blocks
from mlx_server.engine.sampling.sampler import token_logprobs
from mlx_server.engine.sequence import Sequence

SCORING_CHUNK = 128
"""Prompt positions scored at once: their logits (positions, vocab) are held in memory."""
SNAPSHOT_EVERY = 512
"""Prompt tokens between the snapshots of a model whose caches cannot all be cut into blocks."""


class Prefill(Protocol):
    """Sequences whose prompts are being computed: `position` of `length` tokens are."""

    sequences: list[Sequence]
    position: int
    length: int
    until: int | None
    """Where a prompt that others branch off from stops; None for its end."""

    @property
    def cache(self) -> Cache: ...

    @property
    def mixes(self) -> bool:
        """Whether the next chunk can be computed in one pass with a decode step."""

    def size(self, budget: int) -> tuple[int, float]:
        """Tokens of the next chunk over all rows, and how many keys each attends to on average."""

    def advance(self, budget: int) -> None:
        """Compute one chunk of about `budget` tokens."""

    def batch_cache(self) -> Cache:
        """The cache in the form that the decoding batch takes."""


class PromptPrefill:
    """One prompt, in chunks."""

    def __init__(
        self, model: Backend, prefix: PrefixCache, sequence: Sequence, until: int | None = None
    ) -> None:
        self.sequences = [sequence]
        self.cache, self.position = cache_of(model, prefix, sequence)
        self.length = until or len(sequence.request.prompt) - 1
        self.until = until
        self._model = model
        self._prefix = prefix
        self._sequence = sequence
        self._snapshot_at = self.position

    @property
    def mixes(self) -> bool:
        return not self._sequence.scored and self.position < self.length

    def size(self, budget: int) -> tuple[int, float]:
        tokens = self._end(budget) - self.position
        return tokens, self.position + tokens / 2

    def advance(self, budget: int) -> None:
        if self.position >= self.length:  # all of it is cached, or it is a prompt of one token
            return
        part = self.next_part(budget)
        if self._sequence.scored:
            self._score(part.tokens)
            mx.eval(self.computed(part))
            return
        states = self._model.prefill(part.tokens, self.cache)
        mx.eval(self.computed(part, None if states is None else states[0]))

    def next_part(self, budget: int) -> Part:
        """The tokens (1, tokens) of the next chunk, for which the cache is ready."""
        prompt = self._sequence.request.prompt
        chunk = prompt[self.position : self._end(budget)]
        kv.reserve(self.cache, len(prompt) - self.position, len(chunk))
        return Part(mx.array([chunk]), self.cache)

    def computed(self, part: Part, states: mx.array | None = None) -> list[mx.array]:
        """Record that `part` is in the cache, or will be; `states` (tokens, width) are those of its
        tokens, for the model's head.

        Returns what is to be evaluated before the cache is next written to.
        """
        start = self.position
        self.position += part.tokens.size
        kept = store_blocks(self._prefix, self._sequence, self.cache, 0, self.position)
        if states is not None and self.length - self.position < HELD:
            kept += keep_states(self._sequence, start, states)
        return kept + self._snapshot()

    def go_on(self) -> None:
        """Compute the rest of a prompt that was to stop before its end."""
        self.until = None
        self.length = len(self._sequence.request.prompt) - 1

    def batch_cache(self) -> Cache:
        return self._model.caches.merge([self.cache])

    def _end(self, budget: int) -> int:
        if self._sequence.scored:
            budget = min(budget, SCORING_CHUNK)
        end = min(self.position + budget, self.length)
        last_boundary = self.length // BLOCK * BLOCK
        if self._prefix.layout.sliceable or self.position >= last_boundary:
            return end
        return min(max(end // BLOCK * BLOCK, self.position // BLOCK * BLOCK + BLOCK), last_boundary)

    def _snapshot(self) -> list[mx.array]:
        """Keep the state of layers that cannot be cut, where later prompts may take it up."""
        if self._prefix.layout.sliceable or self.position % BLOCK or not self.position:
            return []
        last = self.position + BLOCK > self.length
        if not last and self.position - self._snapshot_at < SNAPSHOT_EVERY:
            return []
        self._snapshot_at = self.position
        key = self._sequence.keys[self.position // BLOCK - 1]
        return self._prefix.store_snapshot(key, self.cache)

    def _score(self, chunk: mx.array) -> None:
        """Prefill `chunk` (1, tokens) and read the log-probability of the token after each."""
        sequence = self._sequence
        logits = self._model.forward(chunk, self.cache)[0]
        start = self.position + 1
        following = sequence.request.prompt[start : start + chunk.size]
        most = sequence.request.prompt_logprobs or 0
        read = token_logprobs(logits, mx.array(following), most)
        mx.eval(read, [layer.state for layer in self.cache])
        assert sequence.prompt_logprobs is not None
        sequence.prompt_logprobs += logprob_entries(following, read)


class GroupPrefill:
    """Several prompts, padded to the longest, in a single chunk, so that no row leaves half-way."""

    until: int | None = None
    mixes = False

    def __init__(self, model: Backend, prefix: PrefixCache, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        begun = [cache_of(model, prefix, sequence) for sequence in sequences]
        self.cache: Cache = kv.merge([cache for cache, _ in begun])
        self.position = 0
        self._starts = [start for _, start in begun]
        pairs = zip(sequences, self._starts, strict=True)
        self._missing = [sequence.request.prompt[start:-1] for sequence, start in pairs]
        self.length = max(len(tokens) for tokens in self._missing)
        self._model = model
        self._prefix = prefix

    def size(self, budget: int) -> tuple[int, float]:
        rows = len(self.sequences)
        return self.length * rows, sum(self._starts) / rows + self.length / 2

    def advance(self, budget: int) -> None:
        if self.position >= self.length:
            return
        states = prefill_padded(self._model, self._missing, self.cache)
        self.position = self.length
        lengths = [len(sequence.request.prompt) - 1 for sequence in self.sequences]
        rows = enumerate(zip(self.sequences, lengths, strict=True))
        kept = [store_blocks(self._prefix, s, self.cache, row, n) for row, (s, n) in rows]
        if states is not None:
            for row, sequence in enumerate(self.sequences):
                own = states[row, : len(self._missing[row])]
                kept.append(keep_states(sequence, self._starts[row], own))
        mx.eval(kept)

    def batch_cache(self) -> Cache:
        return self.cache


def keep_states(sequence: Sequence, start: int, states: mx.array) -> list[mx.array]:
    """Keep `states` (tokens, width) of the tokens from `start` on for the model's head; returns
    what is to be evaluated.
    """
    if sequence.unread is None:
        return []
    skipped = max(0, states.shape[0] - HELD)
    kept = mx.contiguous(states[skipped:])  # in a buffer of its own
    sequence.unread.add(start + skipped, kept)
    return [kept]


def cache_of(model: Backend, prefix: PrefixCache, sequence: Sequence) -> tuple[Cache, int]:
    """A cache with what is known of the prompt, and how many tokens that is."""
    cache = model.new_cache()
    match = (
        Match() if sequence.scored else prefix.match(sequence.request.prompt, sequence.usable_keys)
    )
    prefix.fill(cache, match)
    if sequence.cached is None:
        sequence.cached = match.length
    return cache, match.length
