"""The requests of an engine as they run: prompts being prefilled, and the decoding batch."""

import copy
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import msgspec

from mlx_server.engine import backend
from mlx_server.engine.backend import Backend, Cache
from mlx_server.engine.protocol import FinishReason, Generate, Logprobs, Row, Sampling
from mlx_server.engine.sampling import BatchSampler, LogprobReader, token_logprobs

EXPECTED_TOKENS = 256
"""Completion tokens that admission makes room for; what gets longer may be preempted."""
SCORING_CHUNK = 128
"""Prompt positions scored at once: their logits (positions, vocab) are held in memory."""


class Sequence:
    """One request and how far it is.

    `launched` counts the completion tokens sampled so far, read back or not.
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
        self.in_flight = False
        self.reported = False
        self.done = False

    @property
    def position(self) -> int:
        return self.launched

    @property
    def length(self) -> int:
        """Tokens in the cache once what is launched has been computed."""
        return len(self.prompt) + self.launched

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
            cached=0 if first else None,
        )


class Prefill:
    """Prompts on their way into a cache: several short ones together, or a long one in chunks.

    A prompt's last token is left for the decoding batch, whose next step then gives the first
    token of the completion. Several prompts are padded to the longest and take a single chunk, so
    that a row never has to leave half-way.
    """

    def __init__(self, model: Backend, sequences: list[Sequence]) -> None:
        self.model = model
        self.sequences = sequences
        self.position = 0
        self.length = max(len(s.request.prompt) - 1 for s in sequences)
        self.cache: Cache = (
            model.new_cache()
            if len(sequences) == 1
            else backend.merge([model.new_cache() for _ in sequences])
        )

    @property
    def finished(self) -> bool:
        return self.position >= self.length

    def advance(self, budget: int) -> int:
        """Compute one chunk of about `budget` tokens over all rows; returns how many it was."""
        if self.finished:  # prompts of one token
            return 0
        if len(self.sequences) > 1:
            self._together()
            return self.length * len(self.sequences)
        sequence = self.sequences[0]
        scored = sequence.request.prompt_logprobs is not None
        size = min(budget, SCORING_CHUNK) if scored else budget
        end = min(self.position + size, self.length)
        chunk = mx.array([sequence.request.prompt[self.position : end]])
        if scored:
            self._score(sequence, chunk, end)
        else:
            self.model.prefill(chunk, self.cache)
        done, self.position = end - self.position, end
        return done

    def _together(self) -> None:
        prompts = [s.request.prompt[:-1] for s in self.sequences]
        padded = mx.array([p + [0] * (self.length - len(p)) for p in prompts])
        backend.pad_right(self.cache, [len(p) for p in prompts])
        self.model.prefill(padded, self.cache)
        backend.unpad(self.cache)
        self.position = self.length

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
    tokens: mx.array
    logprobs: tuple[mx.array, ...] | None

    def read(self) -> list[Row]:
        """Wait for the tokens and hand them to their sequences."""
        mx.eval(self.tokens, self.logprobs or ())
        tokens = _ints(self.tokens)
        entries = self._entries(tokens)
        return [
            sequence.accept(token, entries.get(sequence.id))
            for sequence, token in zip(self.rows, tokens, strict=True)
            if not sequence.done
        ]

    def _entries(self, tokens: list[int]) -> dict[int, Logprobs]:
        """Log-probabilities of the rows that asked for them, by request id."""
        if self.logprobs is None:
            return {}
        asked = [i for i, row in enumerate(self.rows) if row.request.logprobs is not None]
        entries = _entries([tokens[i] for i in asked], self.logprobs)
        return {
            self.rows[i].id: Logprobs(e.token, e.logprob, e.top[: self.rows[i].request.logprobs])
            for i, e in zip(asked, entries, strict=True)
        }


class Batch:
    """The decoding batch: one row a request, one batch cache, one token a row and step.

    Step n+1 is launched on the device before the tokens of step n are read, so the host's work
    hides behind the device's.
    """

    def __init__(self, model: Backend) -> None:
        self.model = model
        self.rows: list[Sequence] = []
        self.cache: Cache = []
        self.inputs = mx.array([], dtype=mx.uint32)
        self.pending: Step | None = None
        self._sampler: BatchSampler | None = None
        self._logprobs = LogprobReader([])

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
        """Drop these rows and their caches."""
        ids = {sequence.id for sequence in gone}
        keep = [i for i, row in enumerate(self.rows) if row.id not in ids]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        self.cache = backend.keep_rows(self.cache, keep)
        self.inputs = self.inputs[mx.array(keep)] if keep else mx.array([], dtype=mx.uint32)
        self._sampler = None

    def step(self) -> list[Row]:
        """Launch the next step and read the one before it."""
        previous, self.pending = self.pending, None
        self.leave([row for row in self.rows if row.done or row.launched >= row.limit])
        if self.rows:
            self.pending = self._launch()
        return previous.read() if previous else []

    def clear(self) -> None:
        """Forget every row."""
        self.leave(list(self.rows))
        self.pending = None

    def _launch(self) -> Step:
        if self._sampler is None:
            self._sampler = BatchSampler(self.rows, self.inputs, self.model.vocab_size)
            self._logprobs = LogprobReader([row.request.logprobs for row in self.rows])
        logits = self.model.forward(self.inputs[:, None], self.cache)[:, -1, :]
        logits = logits.astype(mx.float32)
        tokens = self._sampler.sample(logits)
        logprobs = self._logprobs.read(logits, tokens)
        mx.async_eval(tokens, logprobs or ())  # type: ignore[no-untyped-call]
        for row in self.rows:
            row.launched += 1
            row.in_flight = True
        self.inputs = tokens
        return Step(list(self.rows), tokens, logprobs)


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
