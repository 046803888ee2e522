"""Carries Plans out: owns the sequences that run, their caches, and the prefix cache's arrays."""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx

from mlx_server.engine.cache.prefix import BLOCK, PrefixCache
from mlx_server.engine.cache.rows import forget
from mlx_server.engine.grammar.compiler import GrammarCompiler
from mlx_server.engine.grammar.masks import MaskThread
from mlx_server.engine.plan import (
    Begin,
    Chunk,
    ChunkTime,
    DraftTime,
    Outcome,
    Plan,
    Start,
    VerifiedTime,
)
from mlx_server.engine.protocol import Row, Sharing, Tokens
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.batch import Batch
from mlx_server.engine.run.drafted import OWN_RIGHT, OWN_WRONG, Drafted, Trust
from mlx_server.engine.run.drafts import Drafts
from mlx_server.engine.run.even_prefill import EvenPrefill
from mlx_server.engine.run.groups import Groups
from mlx_server.engine.run.heads.guesses import Heads
from mlx_server.engine.run.heads.unread import Unread
from mlx_server.engine.run.kv import cache_bytes
from mlx_server.engine.run.lookup import Experience, Forced, Guesser, Lookup
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.prefill import GroupPrefill, Prefill, PromptPrefill
from mlx_server.engine.run.prefixes import WaitingPrefixes
from mlx_server.engine.run.verify import Guesses
from mlx_server.engine.sequence import Sequence, usable_keys

INDEXED = 4096
"""Tokens of a prompt that are made known to guesses in a turn; they take some milliseconds."""


class _MixedChunk(NamedTuple):
    """A chunk in a step under way: its tokens, keys each attends to, and when it began."""

    tokens: int
    keys: float
    began: float


class Runner:
    """The computing side of an engine. It decides nothing: given the same Plans, two do the same.

    `prefills` are by the id of their first request.
    """

    def __init__(
        self,
        model: Backend,
        prefix: PrefixCache,
        grammars: GrammarCompiler,
        context_length: int,
        draft: Backend | None = None,
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.drafts: Drafts | Heads | None = None
        if draft is not None:
            self.drafts = Drafts(draft, PrefixCache(draft.layout, 0), model.vocab_size)
        elif model.head is not None:
            self.drafts = Heads(model.head, model.context_length, model.vocab_size)
        self.grammars = grammars
        self.mask_thread = MaskThread()
        self.context_length = context_length
        self.prefills: dict[int, Prefill] = {}
        self.waiting = WaitingPrefixes(prefix, model.ranks)
        self.batch = Batch(model, Groups(model, prefix), self.mask_thread)
        self._mixed: _MixedChunk | None = None
        self._experience = Experience()

    @property
    def busy(self) -> bool:
        return bool(self.prefills) or self.batch.busy

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that hold a place: those that decode, then those that prefill."""
        prefilling = (s for prefill in self.prefills.values() for s in prefill.sequences)
        return [*self.batch.rows, *prefilling]

    @property
    def kv_bytes(self) -> int:
        prefilling = sum(cache_bytes(prefill.cache) for prefill in self.prefills.values())
        drafts = self.drafts.nbytes if self.drafts else 0
        unread = sum(s.unread.nbytes for s in self.sequences if s.unread is not None)
        return self.batch.nbytes + prefilling + drafts + unread

    @property
    def prefix_bytes(self) -> int:
        return self.prefix.nbytes + (self.drafts.prefix_bytes if self.drafts else 0)

    def run(self, plan: Plan, outcome: Outcome) -> Iterator[Tokens]:
        """Carry `plan` out; yields rows as soon as they are read, and fills `outcome`."""
        self.model.ranks.begin(plan)
        self._leave(plan, outcome)
        self.waiting.load(plan.load)
        self.waiting.fetch(plan.fetch)
        if plan.begin is not None:
            self._begin(plan.begin, outcome)
        self._resize_prefixes(plan.prefix_limit)
        for sequence in self.sequences:
            if sequence.guesser is not None:
                sequence.guesser.index(INDEXED)
        prefill = self.prefills.get(plan.chunk.id) if plan.chunk else None
        budget = plan.chunk.tokens if plan.chunk else 0
        if plan.mixed and isinstance(prefill, PromptPrefill) and prefill.mixes:
            yield from self._mixed_step(prefill, budget, plan.guess, outcome)
        else:
            if plan.decode and plan.guess:
                yield from self._verify(plan.guess, outcome)
            elif plan.decode:
                yield Tokens(self._decode(outcome))
            if prefill is not None:
                yield Tokens(self._prefill(prefill, budget, outcome))
        if plan.catch_up is not None:
            self._catch_up(plan.catch_up, outcome)
        outcome.failed += self.batch.take_failed()
        self.prefix.disk.pump()

    def reset(self, outcome: Outcome) -> list[Start]:
        """Forget all arrays, which a failure has spoilt; returns what was running, in order."""
        outcome.failed += self.batch.take_failed()
        running = {s.id: s for s in self.sequences if not s.done}
        if self.batch.pending:
            running |= {s.id: s for s in self.batch.pending.rows if not s.done}
        self.prefills.clear()
        self.waiting.clear()
        self.forget_prefixes()
        if self.drafts is not None:
            self.drafts.clear()
        self.batch = Batch(self.model, Groups(self.model, self.prefix), self.mask_thread)
        self._mixed = None
        return [sequence.restart() for sequence in running.values()]

    def rest(self, prefix_limit: int) -> None:
        """Let go of what outlives a step; for when nothing runs. `prefix_limit` is in bytes."""
        self.model.ranks.rest(prefix_limit)
        if self.drafts is not None:
            self.drafts.keep(frozenset())
        self._resize_prefixes(prefix_limit)
        self.model.release()
        forget()

    def forget_prefixes(self) -> None:
        self.model.ranks.forget()
        self.prefix.clear()
        if self.drafts is not None:
            self.drafts.forget_prefixes()

    def _resize_prefixes(self, limit: int) -> None:
        """Bytes for the model's and a draft model's."""
        mine = self.prefix.layout.bytes_per_token
        theirs = self.drafts.resize(limit, mine) if self.drafts is not None else 0
        self.prefix.resize(limit - theirs)

    def _leave(self, plan: Plan, outcome: Outcome) -> None:
        for id_ in plan.drop:
            self.waiting.drop(id_)
        gone = {*plan.drop, *plan.preempt}
        leaving = [sequence for sequence in self.sequences if sequence.id in gone]
        for sequence in leaving:
            sequence.done = True
            self.prefills.pop(sequence.id, None)
            if sequence.id in plan.preempt:
                outcome.returned.append(sequence.restart())
        self.batch.leave(leaving)
        if self.drafts is not None:
            self.drafts.keep(frozenset(row.id for row in self.batch.rows if not row.done))

    def _begin(self, begin: Begin, outcome: Outcome) -> None:
        sequences = [Sequence(start, self.context_length) for start in begin.starts]
        for sequence in sequences:
            self._equip(sequence)
        prefill: Prefill
        if len(sequences) == 1:
            prefill = PromptPrefill(self.model, self.prefix, sequences[0], begin.until)
        elif self.model.batching.prefill is Sharing.ANY:
            prefill = GroupPrefill(self.model, self.prefix, sequences)
        else:
            prefill = EvenPrefill(self.model, self.prefix, sequences)
        for start, sequence in zip(begin.starts, sequences, strict=True):
            self.waiting.unpin(sequence.id)
            if start.cached is None:
                outcome.prompts.append((len(sequence.request.prompt), sequence.cached or 0))
        self.prefills[sequences[0].id] = prefill
        outcome.begun = True

    def _equip(self, sequence: Sequence) -> None:
        """With what drawing and guessing its tokens takes."""
        if sequence.request.grammar is not None:
            sequence.constrain(self.grammars.compile(sequence.request.grammar).result())
        if self.model.guesses:
            sequence.guesser = self._guesser(sequence)
        if isinstance(self.drafts, Heads):
            sequence.unread = Unread()

    def _guesser(self, sequence: Sequence) -> Guesser:
        prediction = sequence.request.prediction
        lookup = Lookup(self._experience, sequence.prompt, prediction, sequence.completion)
        bound = sequence.constraint is not None
        own = Forced(self._experience, lookup) if bound else lookup
        if self.drafts is None:
            return own
        longest, vocabulary = self.drafts.context_length, self.drafts.vocab_size
        of_head = isinstance(self.drafts, Heads)
        trust = Trust(OWN_RIGHT, OWN_WRONG) if of_head else Trust()
        return Drafted(own, sequence.request.prompt, longest, vocabulary, trust)

    def _decode(self, outcome: Outcome) -> list[Row]:
        if not self.batch.busy:
            return []
        if self.batch.owes:
            self.batch.drop_ended()
            return self._verified({}, outcome)
        started, reads = time.perf_counter(), self.batch.pending is not None
        rows = self.batch.step()
        seconds = time.perf_counter() - started
        if rows and reads and self.batch.pending is None:
            outcome.settle_seconds, outcome.rows = seconds, len(rows)
        elif rows:
            outcome.step_seconds, outcome.rows = seconds, len(rows)
        elif not reads:
            outcome.start_seconds, outcome.rows = seconds, len(self.batch.rows)
        self._end_mixed(outcome)
        return rows

    def _verify(self, most: dict[int, int], outcome: Outcome) -> Iterator[Tokens]:
        """A guess needs to know all tokens before it, so nothing else is under way."""
        started = time.perf_counter()
        rows = self._settle(outcome)
        if rows:
            outcome.settle_seconds, outcome.rows = time.perf_counter() - started, len(rows)
        yield Tokens(rows)
        self.batch.drop_ended()
        guesses = self._found(most, outcome)
        if guesses:
            yield Tokens(self._verified(guesses, outcome))
        else:
            yield Tokens(self._decode(outcome))

    def _verified(
        self,
        guesses: Guesses,
        outcome: Outcome,
        part: Part | None = None,
        chunk: tuple[int, float] | None = None,
    ) -> list[Row]:
        """`chunk` is the size of `part`, which goes beside."""
        started = time.perf_counter()
        verified = self.batch.verify(guesses, *([] if part is None else [part]))
        seconds = time.perf_counter() - started
        outcome.verified = VerifiedTime(verified.taken, verified.tokens, seconds, chunk)
        outcome.guessed, outcome.accepted = verified.guessed, verified.accepted
        return verified.rows

    def _found(self, most: dict[int, int], outcome: Outcome) -> Guesses:
        return self.model.ranks.guesses(self.batch.guesses(most) | self._drawn(most, outcome))

    def _drawn(self, most: dict[int, int], outcome: Outcome) -> dict[int, list[int]]:
        """What the draft model guesses, for the rows for which it does."""
        if self.drafts is None:
            return {}
        started = time.perf_counter()
        guesses = self.drafts.guess(self.batch.room_for_drafts(most))
        if guesses:
            steps = max(map(len, guesses.values()))
            outcome.drafted = DraftTime(len(guesses), steps, time.perf_counter() - started)
        return guesses

    def _catch_up(self, chunk: Chunk, outcome: Outcome) -> None:
        row = next((row for row in self.batch.rows if row.id == chunk.id and not row.done), None)
        if self.drafts is None or row is None:
            return
        started = time.perf_counter()
        tokens, keys = self.drafts.catch_up(row, chunk.tokens)
        seconds = time.perf_counter() - started
        if tokens:
            behind = self.batch.pending is not None
            outcome.caught_up = ChunkTime(tokens, keys, seconds, mixed=False, behind_step=behind)

    def _mixed_step(
        self, prefill: PromptPrefill, budget: int, guess: dict[int, int], outcome: Outcome
    ) -> Iterator[Tokens]:
        """Rows are told before anything else may fail."""
        if self.model.eager or guess:
            yield Tokens(self._settle(outcome))
        self.batch.drop_ended()
        if not self.batch.rows:  # the last of them has just ended
            yield Tokens(self._decode(outcome))
            yield Tokens(self._prefill(prefill, budget, outcome))
            return
        guesses = self._found(guess, outcome) if guess else {}
        chunk, part = prefill.size(budget), prefill.next_part(budget)
        if guesses:
            yield Tokens(self._verified(guesses, outcome, part, chunk))
        else:
            yield Tokens(self._step_beside(part, chunk, outcome))
        written = [layer.state for layer in prefill.cache]
        kept = prefill.computed(part, self.batch.take_beside())
        mx.async_eval(written, kept)  # type: ignore[no-untyped-call]
        yield Tokens(self._after_chunk(prefill, outcome))

    def _step_beside(self, part: Part, chunk: tuple[int, float], outcome: Outcome) -> list[Row]:
        began = time.perf_counter()
        rows = self.batch.step(part)
        self._end_mixed(outcome)
        if not self.model.eager:  # the device begins once the step is done that has been read
            began = time.perf_counter()
        self._mixed = _MixedChunk(*chunk, began)
        if self.batch.pending is None:
            self._end_mixed(outcome)
        return rows

    def _settle(self, outcome: Outcome) -> list[Row]:
        rows = self.batch.settle()
        self._end_mixed(outcome)
        return rows

    def _end_mixed(self, outcome: Outcome) -> None:
        """Measure the mixed step that has just been read, if it was one."""
        if self._mixed is not None:
            tokens, keys, began = self._mixed
            seconds = time.perf_counter() - began
            outcome.chunk = ChunkTime(tokens, keys, seconds, mixed=True, behind_step=False)
            self._mixed = None

    def _prefill(self, prefill: Prefill, budget: int, outcome: Outcome) -> list[Row]:
        tokens, keys = prefill.size(budget)
        started = time.perf_counter()
        prefill.advance(budget)
        seconds = time.perf_counter() - started
        if tokens:
            behind = self.batch.pending is not None
            outcome.chunk = ChunkTime(tokens, keys, seconds, mixed=False, behind_step=behind)
        return self._after_chunk(prefill, outcome)

    def _after_chunk(self, prefill: Prefill, outcome: Outcome) -> list[Row]:
        if prefill.position < prefill.length:
            return []
        first = prefill.sequences[0]
        if prefill.until is not None and isinstance(prefill, PromptPrefill):
            return self._branch(prefill, first, outcome)
        rows = []
        if first.decodes:
            outcome.joined_empty_batch = not self.batch.rows
            self.batch.join(prefill)
        else:
            rows = [first.report([], "length")]
        del self.prefills[first.id]  # not before: a failure would lose those who join
        return rows

    def _branch(self, prefill: PromptPrefill, sequence: Sequence, outcome: Outcome) -> list[Row]:
        """What a prompt shares with others is computed: it goes on together with them."""
        assert prefill.until is not None
        if self.prefix.known(sequence.keys) < prefill.until // BLOCK:
            prefill.go_on()  # the cache had no room for it
            return []
        del self.prefills[sequence.id]
        again = sequence.restart()
        outcome.returned.append(again)
        self.waiting.pin(sequence.id, usable_keys(again))
        return []


class FollowingRunner(Runner):
    """Of a rank that draws and guesses nothing."""

    def __init__(self, model: Backend, prefix: PrefixCache, context_length: int) -> None:
        grammars = GrammarCompiler(model.path, model.vocab_size)  # never asked
        super().__init__(model, prefix, grammars, context_length)

    def _equip(self, sequence: Sequence) -> None: ...


def covered_blocks(prefills: Mapping[int, Prefill]) -> list[tuple[Sequence, int]]:
    """Sequences that prefill, and how many blocks of each will be in the prefix cache then."""
    covered = []
    for prefill in prefills.values():
        if prefill.until is not None:
            covered.append((prefill.sequences[0], prefill.until // BLOCK))
        else:
            covered += [(sequence, len(sequence.usable_keys)) for sequence in prefill.sequences]
    return covered
