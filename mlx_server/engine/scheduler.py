"""What an engine does next: admit, decode one step, prefill one bounded chunk, report.

First come, first served, in turns between callers. A turn holds at most one chunk of prefill, sized
from measured speed so that running streams are never delayed by more than a few of their own steps,
and prompts take their chunks in rotation, so that a short one does not wait behind a long one.
"""

import time
from collections import deque
from collections.abc import Sequence as Many

from mlx_server.engine.backend import Backend, cache_bytes
from mlx_server.engine.batch import Batch, Prefill, Sequence
from mlx_server.engine.protocol import Failed, Generate, Row, Sampling, Stats, Tokens
from mlx_server.engine.waiting import WaitingQueue
from mlx_server.utils.memory import DeviceMemory

SMALLEST_CHUNK = 32
LARGEST_CHUNK = 2048
IDLE_CHUNK_SECONDS = 2.0
"""How long a chunk may take while nothing decodes: what an abort may have to wait for."""
STEPS_PER_CHUNK = 2.0
"""How many decode steps a chunk may last while streams run."""
GATHER_STEPS = 10
"""For how many steps' time a new batch may wait for prompts that are ready to join it."""
LONGEST_BURST_SECONDS = 0.01
STEP_WEIGHT = 0.2
RATE_WEIGHT = 0.1
MOST_PADDING = 1.5
"""Prompts prefill together while padding makes the work no more than this times as large."""


class Pace:
    """How many prompt tokens a turn may compute, from how fast things have gone so far.

    `step_seconds` is a moving average over decode steps. `prefill_rate`, in tokens a second,
    follows the best chunks at once and worse ones slowly: small chunks are slow for their size and
    tell little about what a large one would take.
    """

    def __init__(self, fixed_chunk: int | None) -> None:
        self.fixed_chunk = fixed_chunk
        self.step_seconds = 0.0
        self.prefill_rate = 0.0

    def stepped(self, seconds: float) -> None:
        """A decode step took this long."""
        previous = self.step_seconds or seconds
        self.step_seconds = previous + STEP_WEIGHT * (seconds - previous)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took this long."""
        rate = tokens / seconds
        self.prefill_rate = max(rate, self.prefill_rate + RATE_WEIGHT * (rate - self.prefill_rate))

    def chunk(self, decoding: bool) -> int:
        """Tokens for the next chunk."""
        if self.fixed_chunk is not None:
            return self.fixed_chunk
        seconds = IDLE_CHUNK_SECONDS
        if decoding:
            seconds = min(seconds, STEPS_PER_CHUNK * self.step_seconds)
        tokens = int(self.prefill_rate * seconds)
        return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, tokens))

    def gather_seconds(self) -> float:
        """How long a new batch may wait for company."""
        return GATHER_STEPS * self.step_seconds

    def burst_seconds(self) -> float:
        """How long an idle engine waits for a request to follow another."""
        return min(LONGEST_BURST_SECONDS, self.step_seconds / 4)


class Scheduler:
    """Owns every request of an engine from its arrival to its last token."""

    def __init__(
        self,
        model: Backend,
        memory: DeviceMemory,
        *,
        max_batch: int,
        kv_limit: int,
        prefill_chunk: int | None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.max_batch = max_batch
        self.kv_limit = kv_limit
        self.longest_sequence = model.kv_cost.longest(kv_limit, model.context_length)
        self.pace = Pace(prefill_chunk)
        self.waiting = WaitingQueue()
        self.preempted = 0
        self.prefills: deque[Prefill] = deque()
        self.batch = Batch(model)
        self._gathering_until = 0.0
        self._newcomers_next = False

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefills or self.batch.busy)

    def add(self, request: Generate) -> Failed | None:
        """Queue a request; says why when it can never run."""
        problem = self._problem(request)
        if problem:
            return Failed(request.id, problem)
        self.waiting.add(Sequence(request, self.longest_sequence))
        return None

    def abort(self, ids: Many[int]) -> None:
        """Forget these requests and free what they hold."""
        gone = frozenset(ids)
        self.waiting.remove(gone)
        for prefill in self.prefills:
            prefill.drop(gone)
        self.prefills = deque(p for p in self.prefills if p.sequences)
        rows = [row for row in self.batch.rows if row.id in gone]
        for row in rows:
            row.done = True
        self.batch.leave(rows)

    def turn(self) -> Tokens:
        """One decode step and at most one chunk of prefill; returns what came out."""
        rows = [] if self._gathering() else self._decode()
        rows += self._prefill()
        return Tokens(rows)

    def warm_up(self) -> None:
        """Run a small request, so that kernels are compiled and the pace is known."""
        prompt = [0] * (SMALLEST_CHUNK + 1)
        self.add(Generate(id=0, prompt=prompt, sampling=Sampling(temperature=0), max_tokens=3))
        while self.busy:
            self.turn()
        self.release()

    def fail_all(self, message: str) -> list[Failed]:
        """Give up every request that has begun; the waiting ones stay."""
        begun = [s.id for p in self.prefills for s in p.sequences]
        begun += [row.id for row in self.batch.rows]
        if self.batch.pending:
            begun += [row.id for row in self.batch.pending.rows if not row.done]
        self.prefills.clear()
        self.batch = Batch(self.model)
        return [Failed(id_, message) for id_ in dict.fromkeys(begun)]

    def release(self) -> None:
        """Give freed buffers back when nothing runs, or when too many have gathered."""
        if not self.busy:
            self.memory.release()
            self.memory.trim()
        elif self.memory.read().cache > self.memory.cache_limit:
            self.memory.release()

    def stats(self) -> Stats:
        """The present figures."""
        caches = [self.batch.cache, *(prefill.cache for prefill in self.prefills)]
        return Stats(
            running=len(self.batch),
            prefilling=sum(len(prefill.sequences) for prefill in self.prefills),
            waiting=len(self.waiting),
            step_seconds=self.pace.step_seconds,
            kv_bytes=sum(cache_bytes(cache) for cache in caches),
            preempted=self.preempted,
            memory=self.memory.read(),
        )

    def _problem(self, request: Generate) -> str | None:
        if not request.prompt:
            return "the prompt holds no token"
        if len(request.prompt) + min(request.max_tokens, 1) > self.longest_sequence:
            return (
                f"a prompt of {len(request.prompt)} tokens leaves no room in the "
                f"{self.longest_sequence} that the context and the KV cache hold"
            )
        known = range(self.model.vocab_size)
        for token in (*request.prompt, *request.sampling.logit_bias):
            if token not in known:
                return f"token {token} is not in the model's vocabulary of {len(known)}"
        return None

    def _gathering(self) -> bool:
        """Whether a batch that has not given a token yet should wait for prompts close behind.

        Requests often come in bursts, and a step of a full batch costs little more than one of a
        small batch.
        """
        if not self.batch.rows or any(row.reported for row in self.batch.rows):
            return False
        return time.perf_counter() < self._gathering_until and self._some_nearly_prefilled()

    def _some_nearly_prefilled(self) -> bool:
        chunk = self.pace.chunk(decoding=False)
        if self.waiting and self._free_slots() > 0:
            return len(self.waiting.peek().request.prompt) <= chunk
        return any(p.length - p.position <= chunk for p in self.prefills)

    def _decode(self) -> list[Row]:
        if not self.batch.busy:
            return []
        self._make_room()
        started = time.perf_counter()
        rows = self.batch.step()
        if rows:
            self.pace.stepped(time.perf_counter() - started)
        return rows

    def _prefill(self) -> list[Row]:
        """Compute one chunk of prompt; sequences that are ready join the batch."""
        budget = self.pace.chunk(decoding=any(row.reported for row in self.batch.rows))
        prefill = self._next_prefill(budget)
        if prefill is None:
            return []
        started = time.perf_counter()
        tokens = prefill.advance(budget)
        if tokens:
            self.pace.prefilled(tokens, time.perf_counter() - started)
        if not prefill.finished:
            self.prefills.append(prefill)
            return []
        return self._start_decoding(prefill)

    def _next_prefill(self, budget: int) -> Prefill | None:
        """What gets this turn's chunk: prompts that wait and prompts begun take turns.

        So short prompts do not wait for a long one to end, nor a long one for short ones to stop
        coming. Several prompts admitted together take their only chunk at once.
        """
        self._newcomers_next = not self._newcomers_next
        if self.prefills and not self._newcomers_next:
            return self.prefills.popleft()
        return self._admit(budget) or (self.prefills.popleft() if self.prefills else None)

    def _start_decoding(self, prefill: Prefill) -> list[Row]:
        """Rows of requests that only wanted their prompt scored; all others join the batch."""
        if prefill.sequences[0].limit > prefill.sequences[0].launched:
            if not self.batch.rows:
                self._gathering_until = time.perf_counter() + self.pace.gather_seconds()
            self.batch.join(prefill)
            return []
        return [prefill.sequences[0].report([], "length")]

    def _free_slots(self) -> int:
        return self.max_batch - len(self.batch) - sum(len(p.sequences) for p in self.prefills)

    def _admit(self, budget: int) -> Prefill | None:
        """The first of what waits, as far as slots and memory allow; None if nothing can start."""
        group: list[Sequence] = []
        while self.waiting and len(group) < self._free_slots():
            sequence = self.waiting.peek()
            if group and not _fits(group, sequence, budget):
                break
            if not self._room_for([*group, sequence]):
                break
            group.append(self.waiting.pop())
        return Prefill(self.model, group) if group else None

    def _room_for(self, new: list[Sequence]) -> bool:
        """Whether `new` can be expected to fit the KV limit beside what is admitted."""
        admitted = self._admitted()
        longest = max(s.expected_length for s in (*admitted, *new))
        needed = self.model.kv_cost.bytes(len(admitted) + len(new), longest)
        return needed <= self.kv_limit or not (admitted or len(new) > 1)

    def _admitted(self) -> list[Sequence]:
        return [*self.batch.rows, *(s for prefill in self.prefills for s in prefill.sequences)]

    def _make_room(self) -> None:
        """Take the newest requests back out while the next step might exceed the KV limit.

        They keep their tokens, start over when there is room, and come out the same.
        """
        while len(admitted := self._admitted()) > 1:
            longest = max(sequence.length for sequence in admitted) + 1
            if self.model.kv_cost.bytes(len(admitted), longest) <= self.kv_limit:
                return
            self._preempt_newest()

    def _preempt_newest(self) -> None:
        newest = self.prefills.pop().sequences if self.prefills else self.batch.rows[-1:]
        self.preempted += len(newest)
        for sequence in reversed(newest):
            self.waiting.put_back(sequence.anew())
        self.batch.leave(newest)


def _fits(group: list[Sequence], more: Sequence, budget: int) -> bool:
    """Whether `more` may be prefilled together with `group` in one chunk of `budget` tokens."""
    members = [*group, more]
    if any(s.request.prompt_logprobs is not None or s.limit <= s.launched for s in members):
        return False
    lengths = [len(s.request.prompt) - 1 for s in members]
    work = max(lengths) * len(lengths)
    return work <= budget and work <= MOST_PADDING * sum(lengths)
