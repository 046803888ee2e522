"""The requests that decode: groups of rows with a cache each, one token a row and step."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.grammar.masks import Constraints, Masks
from mlx_server.engine.protocol import Failed, Logprobs, Row
from mlx_server.engine.run import backend
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.prefill import Prefill
from mlx_server.engine.sampling.sampler import BatchSampler, Draw
from mlx_server.engine.sequence import Sequence, logprob_entries, store

MOST_PADDED = 2
"""How many times longer than another a sequence in the same group may be."""
SHORT = 256
"""Tokens; sequences up to this length go together whatever their lengths."""


@dataclass
class Step:
    """A launched decode step whose tokens have not been read back."""

    rows: list[Sequence]
    draw: Draw
    masks: Masks | None = None

    def begin_masks(self) -> None:
        """Have masks computed for the constrained rows, all tokens before this step being known."""
        if self.masks is not None:
            rows = enumerate(self.rows)
            self.masks.begin({i: r.constraint for i, r in rows if r.constraint and not r.done})

    def finish(self) -> list[Failed]:
        """Make the tokens valid; returns the requests that cannot go on."""
        self.draw.finish()
        allowed = self.masks.wait() if self.masks is not None else None
        failed = []
        for place, problem in allowed.problems.items() if allowed is not None else ():
            sequence = self.rows[place]
            if not sequence.done:
                sequence.done = True
                failed.append(Failed(sequence.id, problem))
        return failed

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
        entries = logprob_entries([tokens[i] for i in asked], logprobs)
        return {
            self.rows[i].id: Logprobs(e.token, e.logprob, e.top[: self.rows[i].request.logprobs])
            for i, e in zip(asked, entries, strict=True)
        }


@dataclass
class Group:
    """Rows that share a batch cache, in which all are padded to the longest."""

    rows: list[Sequence]
    cache: Cache

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens in the shortest and in the longest row's cache."""
        lengths = [row.computed for row in self.rows]
        return min(lengths), max(lengths)

    def suits(self, other: "Group") -> bool:
        """Whether the two are better off as one: padding costs memory, and time in every step."""
        (low, high), (others_low, others_high) = self.lengths, other.lengths
        return alike(min(low, others_low), max(high, others_high))


def alike(shortest: int, longest: int) -> bool:
    """Whether sequences of these lengths in tokens may share a cache."""
    return longest <= max(SHORT, MOST_PADDED * shortest)


def most_padded(length: int) -> int:
    """How long the cache of a sequence of `length` tokens may be for the sake of its company.

    A group's members were alike when they met, and have grown by the same number of tokens since.
    """
    return length + max(SHORT, (MOST_PADDED - 1) * length)


class Batch:
    """The decoding batch: one row a request, one token a row and step.

    Sequences of similar length share a group. Where the model cannot compute several groups in one
    pass, all share one.

    Step n+1 is built before the tokens of step n are drawn, where that is the host's to do, and
    started before they are read, so the host's work hides behind the device's. Masks of constrained
    rows are computed in the meantime, from when the tokens before them have been read.

    `failed` are requests that could not go on while all others did, for the caller to take.
    """

    def __init__(self, model: Backend, prefix: PrefixCache, constraints: Constraints) -> None:
        self.model = model
        self.prefix = prefix
        self.constraints = constraints
        self.groups: list[Group] = []
        self.rows: list[Sequence] = []
        self.pending: Step | None = None
        self.failed: list[Failed] = []
        self._inputs = mx.array([], dtype=mx.uint32)
        self._drawn: Draw | None = None
        """What gives the inputs, unless they have been asked for since."""
        self._sampler: BatchSampler | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def busy(self) -> bool:
        return bool(self.rows) or self.pending is not None

    @property
    def inputs(self) -> mx.array:
        """The tokens (rows,) that the next step feeds to the model. May wait for masks."""
        if self._drawn is not None:
            self._feed(self._drawn.tokens)
        return self._inputs

    def _feed(self, inputs: mx.array) -> None:
        self._inputs, self._drawn = inputs, None

    @property
    def nbytes(self) -> int:
        """Bytes of all groups' caches."""
        return sum(backend.cache_bytes(group.cache) for group in self.groups)

    def join(self, prefill: Prefill) -> None:
        """Take over the sequences of a finished prefill."""
        new = Group(prefill.sequences, prefill.batch_cache())
        group = self._group_for(new)
        if group is None:
            self.groups.append(new)
            place = len(self.rows)
        else:
            before = self.groups[: self.groups.index(group) + 1]
            place = sum(len(one.rows) for one in before)
            group.rows += new.rows
            group.cache = backend.extend(group.cache, new.cache)
        last = mx.array([s.request.prompt[-1] for s in new.rows], dtype=mx.uint32)
        self._feed(mx.concatenate([self.inputs[:place], last, self.inputs[place:]]))
        self._changed()

    def leave(self, gone: Many[Sequence]) -> None:
        """Drop these rows and their caches, of which the prefix cache keeps whole blocks."""
        ids = {sequence.id for sequence in gone}
        keep = [i for i, row in enumerate(self.rows) if row.id not in ids]
        if len(keep) == len(self.rows):
            return
        for group in self.groups:
            self._leave_group(group, ids)
        self.groups = [group for group in self.groups if group.rows]
        self._feed(self.inputs[mx.array(keep)] if keep else mx.array([], dtype=mx.uint32))
        self._changed()

    def step(self) -> list[Row]:
        """Start the next step and read the one before it."""
        previous, self.pending = self.pending, None
        self.drop_ended()
        if self.rows:
            self.pending = self._build()
        if previous:
            self.failed += previous.finish()
        if self.pending:
            self.pending.draw.start()
        rows = previous.read() if previous else []
        if self.pending:
            self.pending.begin_masks()
        return rows

    def settle(self) -> list[Row]:
        """Read the step under way and drop the rows that have ended; starts no other."""
        previous, self.pending = self.pending, None
        if previous:
            self.failed += previous.finish()
        rows = previous.read() if previous else []
        for row in self.rows:
            row.in_flight = False
        self.drop_ended()
        return rows

    def step_beside(self, prefill: Prefill, budget: int) -> None:
        """Start the next step and, in the same pass, the next chunk of a prompt.

        No step may be under way, and there must be rows.
        """
        chunk = prefill.next_chunk(budget)
        self.pending = self._build(Part(chunk, prefill.cache))
        self.pending.draw.start()
        self.pending.begin_masks()
        written = [layer.state for layer in prefill.cache]
        mx.async_eval(written, prefill.computed(chunk.size))  # type: ignore[no-untyped-call]

    def drop_ended(self) -> None:
        """Drop the rows that need no further step."""
        self.leave([row for row in self.rows if row.done or row.launched >= row.limit])

    def _group_for(self, new: Group) -> Group | None:
        if not self.model.mixes:
            return self.groups[0] if self.groups else None
        return next((group for group in self.groups if group.suits(new)), None)

    def _leave_group(self, group: Group, ids: set[int]) -> None:
        keep = [i for i, row in enumerate(group.rows) if row.id not in ids]
        if len(keep) == len(group.rows):
            return
        for i, row in enumerate(group.rows):
            if row.id in ids:
                kept = store(self.prefix, row, group.cache, i, row.computed)
                mx.async_eval(kept)  # type: ignore[no-untyped-call]
        group.rows = [group.rows[i] for i in keep]
        group.cache = backend.keep_rows(group.cache, keep)

    def _changed(self) -> None:
        self.rows = [row for group in self.groups for row in group.rows]
        self._sampler = None

    def _build(self, *chunk: Part) -> Step:
        """The graph of the next step; its inputs may still have to be drawn."""
        if self._sampler is None:
            wanted = [row.request.logprobs for row in self.rows]
            bound = [i for i, row in enumerate(self.rows) if row.constraint is not None]
            vocab_size = self.model.vocab_size
            self._sampler = BatchSampler(self.rows, self.inputs, vocab_size, wanted, bound)
        masks = self.constraints.masks() if any(row.constraint for row in self.rows) else None
        logits = self.model.step([*self._parts(), *chunk], len(self.rows))
        draw = self._sampler.launch(logits[:, -1, :].astype(mx.float32), masks)
        for row in self.rows:
            row.launched += 1
            row.in_flight = True
        self._drawn = draw
        return Step(list(self.rows), draw, masks)

    def _parts(self) -> list[Part]:
        parts, start = [], 0
        inputs = self.inputs
        for group in self.groups:
            end = start + len(group.rows)
            parts.append(Part(inputs[start:end, None], group.cache))
            start = end
        return parts


def _ints(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())
