"""Prompts on their way into a cache."""

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import BLOCK, Match, PrefixCache
from mlx_server.engine.run import backend
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.sampling.sampler import token_logprobs
from mlx_server.engine.sequence import Sequence, logprob_entries, store

SCORING_CHUNK = 128
"""Prompt positions scored at once: their logits (positions, vocab) are held in memory."""
SNAPSHOT_EVERY = 512
"""Prompt tokens between the snapshots of a model whose caches cannot all be cut into blocks."""


class Prefill:
    """Prompts on their way into a cache: several short ones together, or a long one in chunks.

    What the prefix cache has of a prompt is not computed again. A prompt's last token is left for
    the decoding batch, whose next step then gives the first token of the completion. Several
    prompts are padded to the longest and take a single chunk, so that a row never has to leave
    half-way. A prompt may be computed `until` where others that wait branch off, to be taken up
    again together with them.
    """

    def __init__(
        self,
        model: Backend,
        prefix: PrefixCache,
        sequences: list[Sequence],
        until: int | None = None,
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.sequences = sequences
        self.until = until
        self.begun = False
        self.starts: list[int] = []
        caches = [self._begun(sequence) for sequence in sequences]
        if len(sequences) == 1:
            self.cache: Cache = caches[0]
            self.position = self.starts[0]
            self.length = until or len(sequences[0].request.prompt) - 1
        else:
            self.cache = backend.merge(caches)
            self.position = 0
            self.length = max(self._missing())
        self._snapshot_at = self.position

    @property
    def finished(self) -> bool:
        return self.position >= self.length

    @property
    def covers(self) -> list[tuple[Sequence, int]]:
        """The sequences, and how many blocks of each will be in the prefix cache at the end."""
        if self.until is not None:
            return [(self.sequences[0], self.until // BLOCK)]
        return [(sequence, len(sequence.usable_keys)) for sequence in self.sequences]

    def chunk(self, budget: int) -> tuple[int, float]:
        """Tokens of the next chunk over all rows, and how many keys each attends to on average."""
        if len(self.sequences) > 1:
            longest = self.length
            rows = len(self.sequences)
            return longest * rows, sum(self.starts) / rows + longest / 2
        tokens = self._end(budget) - self.position
        return tokens, self.position + tokens / 2

    def advance(self, budget: int) -> None:
        """Compute one chunk of about `budget` tokens."""
        self.begun = True
        if self.finished:  # all of it is cached, or it is a prompt of one token
            return
        if len(self.sequences) > 1:
            self._together()
            return
        sequence = self.sequences[0]
        chunk = self.next_chunk(budget)
        if sequence.scored:
            self._score(sequence, chunk)
        else:
            self.model.prefill(chunk, self.cache)
        mx.eval(self.computed(chunk.size))

    @property
    def mixes(self) -> bool:
        """Whether the next chunk can be computed in one pass with a step of decoding."""
        return len(self.sequences) == 1 and not self.sequences[0].scored and not self.finished

    def next_chunk(self, budget: int) -> mx.array:
        """The tokens (1, tokens) of a single prompt's next chunk, for which its cache is ready."""
        self.begun = True
        prompt = self.sequences[0].request.prompt
        chunk = prompt[self.position : self._end(budget)]
        backend.reserve(self.cache, len(prompt) - self.position, len(chunk))
        return mx.array([chunk])

    def computed(self, tokens: int) -> list[mx.array]:
        """Take note that so many more tokens are in a single prompt's cache, or will be.

        Returns what is to be evaluated before the cache is next written to.
        """
        self.position += tokens
        kept = store(self.prefix, self.sequences[0], self.cache, 0, self.position)
        return kept + self._snapshot()

    def resume(self) -> None:
        """Go on to the end of a prompt that was to stop before."""
        self.until = None
        self.length = len(self.sequences[0].request.prompt) - 1

    def _begun(self, sequence: Sequence) -> Cache:
        """A cache with what is known of the prompt."""
        cache = self.model.new_cache()
        prompt = sequence.request.prompt
        match = Match() if sequence.scored else self.prefix.match(prompt, sequence.usable_keys)
        self.prefix.fill(cache, match)
        self.prefix.let_go(sequence.held)
        sequence.held = []
        self.starts.append(match.length)
        if sequence.cached is None:
            sequence.cached = match.length
        return cache

    def _missing(self) -> list[int]:
        """For each sequence, how many tokens remain to be computed."""
        pairs = zip(self.sequences, self.starts, strict=True)
        return [len(sequence.request.prompt) - 1 - start for sequence, start in pairs]

    def _end(self, budget: int) -> int:
        """Where the next chunk of a single prompt ends."""
        scored = self.sequences[0].scored
        end = min(self.position + (min(budget, SCORING_CHUNK) if scored else budget), self.length)
        last_boundary = self.length // BLOCK * BLOCK
        if self.prefix.layout.sliceable or self.position >= last_boundary:
            return end
        return min(max(end // BLOCK * BLOCK, self.position // BLOCK * BLOCK + BLOCK), last_boundary)

    def _snapshot(self) -> list[mx.array]:
        """Keep the state of layers that cannot be cut, where later prompts may take it up."""
        if self.prefix.layout.sliceable or self.position % BLOCK or not self.position:
            return []
        last = self.position + BLOCK > self.length
        if not last and self.position - self._snapshot_at < SNAPSHOT_EVERY:
            return []
        self._snapshot_at = self.position
        key = self.sequences[0].keys[self.position // BLOCK - 1]
        return self.prefix.store_snapshot(key, self.cache)

    def _together(self) -> None:
        pairs = zip(self.sequences, self.starts, strict=True)
        prompts = [sequence.request.prompt[start:-1] for sequence, start in pairs]
        padded = mx.array([p + [0] * (self.length - len(p)) for p in prompts])
        backend.pad_right(self.cache, [len(p) for p in prompts])
        self.model.prefill(padded, self.cache)
        backend.unpad(self.cache)
        self.position = self.length
        rows = enumerate(self.sequences)
        mx.eval(
            [store(self.prefix, s, self.cache, row, len(s.request.prompt) - 1) for row, s in rows]
        )

    def _score(self, sequence: Sequence, chunk: mx.array) -> None:
        """Prefill `chunk` (1, tokens) and read the log-probability of the token after each."""
        logits = self.model.forward(chunk, self.cache)[0]
        start = self.position + 1
        following = sequence.request.prompt[start : start + chunk.size]
        most = sequence.request.prompt_logprobs or 0
        read = token_logprobs(logits, mx.array(following), most)
        mx.eval(read, [layer.state for layer in self.cache])
        assert sequence.prompt_logprobs is not None
        sequence.prompt_logprobs += logprob_entries(following, read)

    def batch_cache(self) -> Cache:
        """The cache in the form that the decoding batch takes."""
        return self.cache if len(self.sequences) > 1 else backend.merge([self.cache])

    def drop(self, ids: frozenset[int]) -> None:
        """Forget these requests; to be called between chunks."""
        if len(self.sequences) == 1 and self.sequences[0].id in ids:
            self.sequences = []
