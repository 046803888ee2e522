"""Writes the Plan of a turn: who gives up a place, who begins, whose prompt gets a chunk."""

import time
from collections import deque
from collections.abc import Iterable

from mlx_server.engine.plan import Begin, Chunk, ChunkTime, Outcome, Plan, VerifiedTime
from mlx_server.engine.run.drafted import Drafted
from mlx_server.engine.run.lookup import MOST
from mlx_server.engine.run.runner import Runner
from mlx_server.engine.schedule.admission import Admission
from mlx_server.engine.schedule.guessing import Chance, Guessing
from mlx_server.engine.schedule.pace import ChunkTimes, Pace
from mlx_server.engine.schedule.request import WaitingRequest
from mlx_server.engine.schedule.room import KvRoom, Sized
from mlx_server.engine.sequence import Sequence


class Planner:
    """Decides by what runs, what waits, the room for caches, and how fast things have gone."""

    def __init__(self, runner: Runner, admission: Admission, room: KvRoom, pace: Pace) -> None:
        self._runner = runner
        self._admission = admission
        self._room = room
        self._pace = pace
        model = runner.model
        self._guessing = Guessing(padded=not model.mixes, goes_back=model.goes_back)
        self._rotation: deque[int] = deque()
        """Prefills in the order of their chunks; the last has had one most recently."""
        self._newcomers_next = False
        self._chunk_last_turn = False
        self._gathering_until = 0.0

    def decide(self, drop: list[int]) -> Plan:
        staying = self._without(drop)
        preempt = self._preempted(staying)
        staying = self._without([*drop, *preempt])
        ids = {sequence.id for sequence in staying}
        rows = [row for row in self._runner.batch.rows if row.id in ids]
        decoding = any(row.reported for row in rows)
        self._rotation = deque(id_ for id_ in self._prefilling() if id_ in ids)
        begin = self._next_prefill(staying, decoding, admit=not preempt)
        chunk, mixed = self._next_chunk(begin, rows, decoding)
        load, fetch = self._admission.take_reads()
        admitted: list[Sized] = [*staying, *self._starting(begin)]
        return Plan(
            drop=drop,
            preempt=preempt,
            load=load,
            fetch=fetch,
            begin=begin,
            prefix_limit=self._room.left_for_prefixes(admitted),
            decode=mixed or not self._gathering(rows, len(admitted)),
            chunk=chunk,
            mixed=mixed,
            guess=self._guesses(rows),
            catch_up=self._next_catch_up(rows) if chunk is None else None,
        )

    def learn(self, plan: Plan, outcome: Outcome) -> None:
        # After a chunk, what a step reads has been computed long since.
        if outcome.step_seconds is not None and not self._chunk_last_turn:
            self._pace.stepped(outcome.step_seconds)
            self._guessing.stepped(outcome.rows, outcome.step_seconds)
        if outcome.settle_seconds is not None:
            self._guessing.settled(outcome.rows, outcome.settle_seconds)
        if outcome.start_seconds is not None:
            self._guessing.started(outcome.rows, outcome.start_seconds)
        if outcome.verified is not None:
            drafting = outcome.drafted.seconds if outcome.drafted is not None else 0.0
            self._learn_from(outcome.verified, drafting)
        if outcome.drafted is not None:
            self._guessing.drafted(*outcome.drafted)
        if outcome.caught_up is not None:
            self._measure(self._pace.drafting, outcome.caught_up)
        if outcome.chunk is not None:
            self._measure(self._pace.chunks, outcome.chunk)
        if outcome.joined_empty_batch:
            self._gathering_until = time.perf_counter() + self._pace.gather_seconds()
        self._chunk_last_turn = plan.chunk is not None or plan.catch_up is not None

    def _without(self, ids: Iterable[int]) -> list[Sequence]:
        gone = frozenset(ids)
        running = (one for one in self._runner.sequences if not one.done)
        return [sequence for sequence in running if sequence.id not in gone]

    def _prefilling(self) -> list[int]:
        return [id_ for id_ in self._rotation if id_ in self._runner.prefills]

    def _preempted(self, staying: list[Sequence]) -> list[int]:
        """The newest requests, as many as must leave lest the next step exceed the KV limit."""
        if not self._runner.batch.busy:
            return []
        left = {sequence.id: sequence for sequence in staying}
        prefilling = [id_ for id_ in self._prefilling() if id_ in left]
        gone: list[int] = []
        while self._room.too_many(list(left.values())):
            # Rows come in the order of their groups, prefills behind them.
            newest = prefilling.pop() if prefilling else list(left)[-1]
            del left[newest]
            gone.append(newest)
        return gone

    def _next_prefill(
        self, staying: list[Sequence], decoding: bool, *, admit: bool
    ) -> Begin | None:
        """Put what gets this turn's chunk last in the rotation; returns it if it is new.

        Waiting prompts and those begun take turns, so that neither kind starves the other.
        """
        self._newcomers_next = not self._newcomers_next
        if admit and (self._newcomers_next or not self._rotation):
            budget = self._pace.chunk(0, decoding)
            begin = self._admission.admit(staying, budget)
            if begin is not None:
                self._rotation.append(begin.starts[0].request.id)
                return begin
        self._rotation.rotate(-1)
        return None

    def _next_chunk(
        self, begin: Begin | None, rows: list[Sequence], decoding: bool
    ) -> tuple[Chunk | None, bool]:
        if not self._rotation:
            return None, False
        id_ = self._rotation[-1]
        if begin is None:
            prefill = self._runner.prefills[id_]
            position, mixes = prefill.position, prefill.mixes
        else:
            first = self._starting(begin)[0]
            position = self._admission.known_tokens(first.keys)
            mixes = len(begin.starts) == 1 and not first.scored
        if decoding and self._runner.model.mixes and mixes:
            return Chunk(id_, self._pace.mixed_chunk(position, len(rows))), True
        return Chunk(id_, self._pace.chunk(position, decoding)), False

    def _gathering(self, rows: list[Sequence], places: int) -> bool:
        """Whether a new batch should wait for prompts close behind: requests come in bursts."""
        if not rows or any(row.reported for row in rows):
            return False
        return time.perf_counter() < self._gathering_until and self._some_nearly_prefilled(places)

    def _some_nearly_prefilled(self, places: int) -> bool:
        chunk = self._pace.chunk(0, decoding=False)
        prefills = self._runner.prefills.values()
        if any(prefill.length - prefill.position <= chunk for prefill in prefills):
            return True
        return self._admission.some_short_prompt(places, chunk)

    def _guesses(self, rows: list[Sequence]) -> dict[int, int]:
        return self._guessing.allot([row.id for row in rows], _chances(rows))

    def _next_catch_up(self, rows: list[Sequence]) -> Chunk | None:
        """Tokens that the draft model's caches lack of a row for which it would pay to guess."""
        drafts, lacking = self._runner.drafts, _lacking_draft(rows)
        if drafts is None or not lacking:
            return None
        worth = self._guessing.allot([row.id for row in rows], _chances(rows) | lacking)
        chosen = next((id_ for id_ in lacking if id_ in worth), None)
        if chosen is None:
            return None
        return Chunk(chosen, self._pace.draft_chunk(drafts.held(chosen)))

    def _starting(self, begin: Begin | None) -> list[WaitingRequest]:
        longest = self._runner.context_length
        return [WaitingRequest(start, longest) for start in begin.starts] if begin else []

    def _learn_from(self, verified: VerifiedTime, drafting: float) -> None:
        taken = verified.taken
        if verified.chunk is None:
            self._guessing.verified(taken, verified.tokens, verified.seconds, drafting)
            return
        alone = self._guessing.expected(verified.tokens, len(taken))
        self._guessing.charge(taken, alone + drafting)
        if alone:
            longer_by = max(verified.seconds - alone, verified.seconds / 10)
            self._pace.mixed.measured(*verified.chunk, longer_by)

    def _measure(self, times: ChunkTimes, chunk: ChunkTime) -> None:
        step = self._pace.step_seconds
        if chunk.mixed:
            longer_by = max(chunk.seconds - step, chunk.seconds / 10)
            self._pace.mixed.measured(chunk.tokens, chunk.keys, longer_by)
            return
        seconds = chunk.seconds
        if chunk.behind_step:  # which the device had to compute first
            seconds = max(seconds - step, seconds / 2)
        times.measured(chunk.tokens, chunk.keys, seconds)


def _chances(rows: list[Sequence]) -> dict[int, Chance]:
    guessing = ((row.id, row.guesser) for row in rows if row.guesser is not None)
    return {
        id_: Chance(one.ready, *one.chances, isinstance(one, Drafted) and one.drafts)
        for id_, one in guessing
        if one.ready
    }


def _lacking_draft(rows: list[Sequence]) -> dict[int, Chance]:
    """Of rows that a draft model is to guess for and has not caught up with: what it could do."""
    return {
        row.id: Chance(MOST, *row.guesser.draft_chances, drafted=True)
        for row in rows
        if isinstance(row.guesser, Drafted)
        and row.guesser.wanted
        and not row.guesser.drafts
        and row.limit - len(row.completion) > MOST
    }
