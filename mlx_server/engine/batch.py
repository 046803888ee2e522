"""The requests of an engine as they run: prompts being prefilled, and the decoding batch."""

import copy
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import msgspec

from mlx_server.engine import backend
from mlx_server.engine.backend import Backend
from mlx_server.engine.disk_cache import BlockRead
from mlx_server.engine.kv_layout import Cache
from mlx_server.engine.prefix_cache import (
    BLOCK,
    Block,
    Match,
    PrefixCache,
    extend_keys,
    usable_blocks,
)
from mlx_server.engine.protocol import FinishReason, Generate, Logprobs, Row, Sampling
from mlx_server.engine.sampling import BatchSampler, Draw, token_logprobs

EXPECTED_TOKENS = 256
"""Completion tokens that admission makes room for; what gets longer may be preempted."""
SCORING_CHUNK = 128
"""Prompt positions scored at once: their logits (positions, vocab) are held in memory."""
SNAPSHOT_EVERY = 512
"""Prompt tokens between the snapshots of a model whose caches cannot all be cut into blocks."""


class Sequence:
    """One request and how far it is.

    `launched` counts the completion tokens sampled so far, read back or not. `keys` names the
    blocks of its tokens in the prefix cache, and `cached` is how many tokens came from there.
    `usable_keys` names those that a cache may answer for. While it waits, `held` are the cached
    blocks it is to use, and `read` those on their way from the disk.
    """

    def __init__(self, request: Generate, context_length: int) -> None:
        self.request = request
        self.id = request.id
        self.sampling: Sampling = request.sampling
        split = len(request.prompt) - request.generated
        self.prompt = request.prompt[:split]
        self.completion = request.prompt[split:]
        self.launched = request.generated
        room = context_length - len(request.prompt)
        self.limit = request.generated + min(request.max_tokens, room)
        self.stop_tokens = frozenset(request.stop_tokens)
        # Nothing precedes the first token of a prompt, so it has no log-probability.
        self.prompt_logprobs: list[Logprobs | None] | None = (
            None if request.prompt_logprobs is None else [None]
        )
        self.keys: list[bytes] = []
        extend_keys(self.keys, request.prompt)
        self.usable_keys = self._usable_keys()
        self.cached: int | None = None
        self.held: list[Block] = []
        self.read: BlockRead | None = None
        self.fetched = False
        self.in_flight = False
        self.reported = False
        self.done = False

    def _usable_keys(self) -> list[bytes]:
        """The names of those blocks of the prompt that a cache may answer for."""
        return [] if self.scored else self.keys[: usable_blocks(self.request.prompt)]

    @property
    def scored(self) -> bool:
        """Whether its prompt's own log-probabilities are wanted, so that all of it is computed."""
        return self.request.prompt_logprobs is not None

    @property
    def position(self) -> int:
        return self.launched

    @property
    def length(self) -> int:
        """Tokens known once what is launched has been read back."""
        return len(self.prompt) + self.launched

    @property
    def computed(self) -> int:
        """Tokens in the batch's cache once what is launched has been computed."""
        return self.length - 1

    @property
    def expected_length(self) -> int:
        """How long the sequence may well get: an early end is likelier than its limit."""
        return self.length + min(EXPECTED_TOKENS, self.limit - self.launched)

    def anew(self) -> "Sequence":
        """The same request with nothing computed, to go on after the tokens read back so far."""
        self.done = True  # whatever is in flight is drawn again, and comes out the same
        again = copy.copy(self)
        scored = None if self.reported else self.request.prompt_logprobs
        again.request = msgspec.structs.replace(
            self.request,
            prompt=self.prompt + self.completion,
            generated=len(self.completion),
            prompt_logprobs=scored,
        )
        again.prompt_logprobs = None if scored is None else [None]
        again.launched = len(self.completion)
        again.usable_keys = again._usable_keys()
        again.held, again.read, again.fetched = [], None, False
        again.in_flight = again.done = False
        return again

    def accept(self, token: int, logprobs: Logprobs | None) -> Row:
        """Take note of the next token read back; says what to report of it."""
        self.completion.append(token)
        finish: FinishReason | None = None
        if token in self.stop_tokens:
            finish = "stop"
        elif len(self.completion) >= self.limit:
            finish = "length"
        self.done = finish is not None
        return self.report([token], finish, [logprobs] if logprobs else None)

    def report(
        self,
        tokens: list[int],
        finish: FinishReason | None,
        logprobs: list[Logprobs] | None = None,
    ) -> Row:
        """A row for the front; the first one carries what is known of the prompt."""
        first, self.reported = not self.reported, True
        return Row(
            id=self.id,
            tokens=tokens,
            finish=finish,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if first else None,
            cached=self.cached if first else None,
        )


def store(
    prefix: PrefixCache, sequence: Sequence, cache: Cache, row: int, computed: int
) -> list[mx.array]:
    """Keep the whole blocks of a row of `cache` that holds `computed` tokens of `sequence`.

    Returns what is to be evaluated before the cache is next written to.
    """
    tokens = sequence.prompt + sequence.completion
    extend_keys(sequence.keys, tokens)
    keys = sequence.keys[: min(computed, len(tokens)) // BLOCK]
    return prefix.store(tokens, keys, cache, row, prefix.layout.padding(cache, computed))


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
            backend.reserve(self.cache, max(1, len(sequences[0].request.prompt) - self.position))
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
        end = self._end(budget)
        chunk = mx.array([sequence.request.prompt[self.position : end]])
        if sequence.scored:
            self._score(sequence, chunk, end)
        else:
            self.model.prefill(chunk, self.cache)
        self.position = end
        mx.eval(store(self.prefix, sequence, self.cache, 0, end), self._snapshot())

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

    def _score(self, sequence: Sequence, chunk: mx.array, end: int) -> None:
        """Prefill `chunk` (1, tokens) and read the log-probability of the token after each."""
        logits = self.model.forward(chunk, self.cache)[0]
        following = sequence.request.prompt[self.position + 1 : end + 1]
        most = sequence.request.prompt_logprobs or 0
        read = token_logprobs(logits, mx.array(following), most)
        mx.eval(read, [layer.state for layer in self.cache])
        assert sequence.prompt_logprobs is not None
        sequence.prompt_logprobs += _entries(following, read)

    def batch_cache(self) -> Cache:
        """The cache in the form that the decoding batch takes."""
        return self.cache if len(self.sequences) > 1 else backend.merge([self.cache])

    def drop(self, ids: frozenset[int]) -> None:
        """Forget these requests; to be called between chunks."""
        if len(self.sequences) == 1 and self.sequences[0].id in ids:
            self.sequences = []


@dataclass
class Step:
    """A launched decode step whose tokens have not been read back."""

    rows: list[Sequence]
    draw: Draw

    def read(self) -> list[Row]:
        """Wait for the tokens and hand them to their sequences."""
        tokens = _ints(self.draw.tokens)
        entries = self._entries(tokens)
        return [
            sequence.accept(token, entries.get(sequence.id))
            for sequence, token in zip(self.rows, tokens, strict=True)
            if not sequence.done
        ]

    def _entries(self, tokens: list[int]) -> dict[int, Logprobs]:
        """Log-probabilities of the rows that asked for them, by request id."""
        logprobs = self.draw.logprobs()
        if logprobs is None:
            return {}
        asked = [i for i, row in enumerate(self.rows) if row.request.logprobs is not None]
        entries = _entries([tokens[i] for i in asked], logprobs)
        return {
            self.rows[i].id: Logprobs(e.token, e.logprob, e.top[: self.rows[i].request.logprobs])
            for i, e in zip(asked, entries, strict=True)
        }


class Batch:
    """The decoding batch: one row a request, one batch cache, one token a row and step.

    Step n+1 is built before the tokens of step n are drawn, where that is the host's to do, and
    started before they are read, so the host's work hides behind the device's.
    """

    def __init__(self, model: Backend, prefix: PrefixCache) -> None:
        self.model = model
        self.prefix = prefix
        self.rows: list[Sequence] = []
        self.cache: Cache = []
        self.inputs = mx.array([], dtype=mx.uint32)
        self.pending: Step | None = None
        self._sampler: BatchSampler | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def busy(self) -> bool:
        return bool(self.rows) or self.pending is not None

    def join(self, prefill: Prefill) -> None:
        """Take over the sequences of a finished prefill."""
        last = mx.array([s.request.prompt[-1] for s in prefill.sequences], dtype=mx.uint32)
        self.rows += prefill.sequences
        self.cache = backend.extend(self.cache, prefill.batch_cache())
        self.inputs = mx.concatenate([self.inputs, last])
        self._sampler = None

    def leave(self, gone: Many[Sequence]) -> None:
        """Drop these rows and their caches, of which the prefix cache keeps whole blocks."""
        ids = {sequence.id for sequence in gone}
        keep = [i for i, row in enumerate(self.rows) if row.id not in ids]
        if len(keep) == len(self.rows):
            return
        for i, row in enumerate(self.rows):
            if row.id in ids:
                kept = store(self.prefix, row, self.cache, i, row.computed)
                mx.async_eval(kept)  # type: ignore[no-untyped-call]
        self.rows = [self.rows[i] for i in keep]
        self.cache = backend.keep_rows(self.cache, keep)
        self.inputs = self.inputs[mx.array(keep)] if keep else mx.array([], dtype=mx.uint32)
        self._sampler = None

    def step(self) -> list[Row]:
        """Start the next step and read the one before it."""
        previous, self.pending = self.pending, None
        self.leave([row for row in self.rows if row.done or row.launched >= row.limit])
        if self.rows:
            self.pending = self._build()
        if previous:
            previous.draw.finish()
        if self.pending:
            self.pending.draw.start()
        return previous.read() if previous else []

    def clear(self) -> None:
        """Forget every row."""
        self.leave(list(self.rows))
        self.pending = None

    def _build(self) -> Step:
        """The graph of the next step; its inputs may still have to be drawn."""
        if self._sampler is None:
            wanted = [row.request.logprobs for row in self.rows]
            self._sampler = BatchSampler(self.rows, self.inputs, self.model.vocab_size, wanted)
        logits = self.model.forward(self.inputs[:, None], self.cache)[:, -1, :]
        draw = self._sampler.launch(logits.astype(mx.float32))
        for row in self.rows:
            row.launched += 1
            row.in_flight = True
        self.inputs = draw.tokens
        return Step(list(self.rows), draw)


def _ints(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())


def _entries(tokens: list[int], read: tuple[mx.array, ...]) -> list[Logprobs]:
    """What `token_logprobs` returned for `tokens`, position by position."""
    chosen = cast(list[float], read[0].tolist())
    tops: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if len(read) > 1:
        ids = cast(list[list[int]], read[1].tolist())
        values = cast(list[list[float]], read[2].tolist())
        tops = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [Logprobs(*entry) for entry in zip(tokens, chosen, tops, strict=True)]
