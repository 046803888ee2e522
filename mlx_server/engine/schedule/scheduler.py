"""What an engine does next: admit, decode one step, prefill one bounded chunk, report.

First come, first served, in turns between callers. A turn holds at most one chunk of prefill, sized
from measured speed so that running streams are never delayed by more than a few of their own steps,
and prompts take their chunks in rotation, so that a short one does not wait behind a long one.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from concurrent.futures import wait

from mlx_server.engine.cache.disk import BlockRead
from mlx_server.engine.cache.prefix import BLOCK, PrefixCache, common_blocks
from mlx_server.engine.grammar.masks import Constraints
from mlx_server.engine.memory import DeviceMemory, is_out_of_memory
from mlx_server.engine.protocol import (
    Begun,
    Failed,
    Generate,
    PrefixStats,
    Row,
    Sampling,
    Stats,
    Tokens,
)
from mlx_server.engine.run.backend import Backend, cache_bytes
from mlx_server.engine.run.batch import Batch, alike, most_padded
from mlx_server.engine.run.prefill import Prefill
from mlx_server.engine.schedule.backoff import Caution
from mlx_server.engine.schedule.pace import SMALLEST_CHUNK, Pace
from mlx_server.engine.schedule.waiting import WaitingQueue
from mlx_server.engine.sequence import Sequence

MOST_PADDING = 1.5
"""Prompts prefill together while padding makes the work no more than this times as large."""
MOST_CONSIDERED = 64
"""Waiting requests that a turn looks at."""
LEAST_SHARED = 48
"""Tokens that must be saved for prompts to be computed one after another rather than at once."""
GROUPED_SNAPSHOTS = 4 * BLOCK
"""Prompts from this length on prefill alone where the prefix cache needs snapshots of them."""
THREADS_WAIT = 0.02
"""Seconds between looks at the inbox while there is nothing to do but to wait for other threads."""


class Scheduler:
    """Owns every request of an engine from its arrival to its last token.

    `kv_limit` is in bytes, for running requests and the prefix cache together; what runs comes
    first.
    """

    def __init__(
        self,
        model: Backend,
        memory: DeviceMemory,
        prefix: PrefixCache,
        *,
        max_batch: int,
        kv_limit: int,
        prefill_chunk: int | None,
        kv_share: float = 1.0,
    ) -> None:
        self.model = model
        self.memory = memory
        self.prefix = prefix
        self.max_batch = max_batch
        self.kv_limit = kv_limit
        self.caution = Caution(kv_share)
        self.prefix_limit = prefix.limit
        self.longest_sequence = model.kv_cost.longest(kv_limit, model.context_length)
        self.pace = Pace(prefill_chunk)
        self.waiting = WaitingQueue()
        self.preempted = 0
        self.longest_turn = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.prefills: deque[Prefill] = deque()
        self.constraints = Constraints(model.path, model.vocab_size)
        self.batch = Batch(model, prefix, self.constraints)
        self._gathering_until = 0.0
        self._newcomers_next = False
        self._chunk_last_turn = False
        self._beside: tuple[int, float, float] | None = None
        """Of a step under way that has a chunk in it: its tokens, keys each, and the start."""

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
        for sequence in self.waiting.remove(gone):
            self.prefix.let_go(sequence.held)
            if sequence.read is not None:
                sequence.read.cancel()
        for prefill in self.prefills:
            prefill.drop(gone)
        self.prefills = deque(p for p in self.prefills if p.sequences)
        rows = [row for row in self.batch.rows if row.id in gone]
        for row in rows:
            row.done = True
        self.batch.leave(rows)

    def turn(self) -> Iterator[Tokens | Begun | Failed]:
        """One decode step and at most one chunk of prefill; yields what comes out of each."""
        started = time.perf_counter()
        self._make_room()
        yield from self._constrain()
        decoding = any(row.reported for row in self.batch.rows)
        prefill = self._next_prefill(self.pace.chunk(0, decoding))
        if prefill is not None and not prefill.begun:
            yield Begun([sequence.id for sequence in prefill.sequences])
        if prefill is not None and decoding and self.model.mixes and prefill.mixes:
            yield Tokens(self._settle())
            yield Tokens(self._decode_beside(prefill))
        else:
            if not self._gathering():
                yield Tokens(self._decode())
            if prefill is not None:
                yield Tokens(self._prefill(prefill, decoding))
        failed, self.batch.failed = self.batch.failed, []
        yield from failed
        self._chunk_last_turn = prefill is not None
        self.prefix.pump()
        if not (self.batch.busy or self.prefills):
            self._await_threads()
        self.longest_turn = max(self.longest_turn, time.perf_counter() - started)

    def warm_up(self) -> None:
        """Run a small request, so that kernels are compiled and the pace is known."""
        prompt = [0] * (2 * SMALLEST_CHUNK + 1)
        self.add(Generate(id=0, prompt=prompt, sampling=Sampling(temperature=0), max_tokens=3))
        while self.busy:
            for _ in self.turn():
                continue
        self.prefix.clear()
        self.prompt_tokens = self.cached_tokens = 0
        self.release()

    def recover(self, error: Exception) -> list[Failed]:
        """Go on after a turn that raised `error`.

        Arrays of what had begun cannot be trusted, so all of it is computed again from the tokens
        known so far. The requests concerned are then tried one by one: one that fails again while
        it is the only one on trial is given up.
        """
        begun = self._begun()
        if not begun:  # it failed as it was to begin
            begun = list(itertools.islice(self.waiting, 1))
            self.waiting.remove(frozenset(sequence.id for sequence in begun))
        for sequence in begun:
            self.prefix.let_go(sequence.held)
        failed = self.batch.failed
        self.prefills.clear()
        self.prefix.clear()
        self.batch = Batch(self.model, self.prefix, self.constraints)
        self._beside = None
        self.memory.release()
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            self.caution.lower()
        suspects = [sequence for sequence in begun if sequence.suspect]
        guilty = begun if len(begun) == 1 else suspects
        if len(guilty) != 1 or (out_of_memory and len(begun) > 1):
            guilty = []
        for sequence in reversed(begun):
            if sequence not in guilty:
                again = sequence.anew()
                again.suspect = not guilty
                self.waiting.put_back(again)
        failed += [Failed(sequence.id, f"{type(error).__name__}: {error}") for sequence in guilty]
        return failed

    def _begun(self) -> list[Sequence]:
        """Every request that has been admitted and has not ended."""
        found = {sequence.id: sequence for sequence in self._admitted() if not sequence.done}
        if self.batch.pending:
            found |= {row.id: row for row in self.batch.pending.rows if not row.done}
        return list(found.values())

    def release(self) -> None:
        """Give freed buffers back when nothing runs, or when too many have gathered."""
        if not self.busy:
            self._apportion()
            self.prefix.settle()
            self.model.release()
            self.memory.release()
            self.memory.trim()
        elif self.memory.read().cache > self.memory.cache_limit:
            self.memory.release()

    def close(self) -> None:
        """Let the prefix cache finish what it writes."""
        self.constraints.close()
        self.prefix.close()

    def stats(self) -> Stats:
        """The present figures."""
        return Stats(
            running=len(self.batch),
            prefilling=sum(len(prefill.sequences) for prefill in self.prefills),
            waiting=len(self.waiting),
            step_seconds=self.pace.step_seconds,
            kv_bytes=self.batch.nbytes
            + sum(cache_bytes(prefill.cache) for prefill in self.prefills),
            preempted=self.preempted,
            prefix=PrefixStats(
                blocks=len(self.prefix),
                bytes=self.prefix.nbytes,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
            ),
            memory=self.memory.read(),
            longest_turn=self.longest_turn,
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
        chunk = self.pace.chunk(0, decoding=False)
        if self._free_slots() > 0:
            missing = (len(s.request.prompt) - self._known(s) for s in self._considered())
            if any(tokens <= chunk for tokens in missing):
                return True
        return any(p.length - p.position <= chunk for p in self.prefills)

    def _decode(self) -> list[Row]:
        if not self.batch.busy:
            return []
        self._beside = None
        started = time.perf_counter()
        rows = self.batch.step()
        # After a chunk, what is read has been computed long since.
        if rows and not self._chunk_last_turn:
            self.pace.stepped(time.perf_counter() - started)
        return rows

    def _settle(self) -> list[Row]:
        """Read the step under way; from one with a chunk, learn how long that took."""
        rows = self.batch.settle()
        if self._beside is not None:
            tokens, keys, started = self._beside
            seconds = time.perf_counter() - started
            self.pace.beside.measured(
                tokens, keys, max(seconds - self.pace.step_seconds, seconds / 10)
            )
            self._beside = None
        return rows

    def _decode_beside(self, prefill: Prefill) -> list[Row]:
        """Start a step that computes a chunk of `prefill` in the same pass."""
        budget = self.pace.chunk_beside(prefill.position, len(self.batch))
        tokens, keys = prefill.chunk(budget)
        if self.batch.rows:
            self._beside = (tokens, keys, time.perf_counter())
            self.batch.step_beside(prefill, budget)
        else:  # the last of them has just ended
            prefill.advance(budget)
        return self._ended(prefill)

    def _prefill(self, prefill: Prefill, decoding: bool) -> list[Row]:
        """Compute one chunk of prompt; sequences that are ready join the batch."""
        budget = self.pace.chunk(prefill.position, decoding)
        tokens, keys = prefill.chunk(budget)
        started = time.perf_counter()
        prefill.advance(budget)
        seconds = time.perf_counter() - started
        if self.batch.pending is not None:  # which the device had to compute first
            seconds = max(seconds - self.pace.step_seconds, seconds / 2)
        if tokens:
            self.pace.chunks.measured(tokens, keys, seconds)
        return self._ended(prefill)

    def _ended(self, prefill: Prefill) -> list[Row]:
        """What comes of a prefill after a chunk."""
        if not prefill.finished:
            return []
        self.prefills.remove(prefill)
        return self._start_decoding(prefill) if prefill.until is None else self._branch(prefill)

    def _branch(self, prefill: Prefill) -> list[Row]:
        """The part that a prompt shares with others is computed: it goes on beside them."""
        sequence = prefill.sequences[0]
        shared = prefill.covers[0][1]
        if self.prefix.known(sequence.keys) >= shared:
            self._hold(sequence)
            self.waiting.put_back(sequence)
        else:  # the cache had no room for it
            prefill.resume()
            self.prefills.append(prefill)
        return []

    def _next_prefill(self, budget: int) -> Prefill | None:
        """What gets this turn's chunk: prompts that wait and prompts begun take turns.

        So short prompts do not wait for a long one to end, nor a long one for short ones to stop
        coming. Several prompts admitted together take their only chunk at once.
        """
        self._newcomers_next = not self._newcomers_next
        if self.prefills and not self._newcomers_next:
            self.prefills.rotate(-1)
        elif admitted := self._admit(budget):
            self.prefills.append(admitted)
        else:
            self.prefills.rotate(-1)
        return self.prefills[-1] if self.prefills else None

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
        """The first of what waits, as far as slots and memory allow; None if nothing can start.

        Prompts whose beginning is being computed or read for them are passed over until it is.
        """
        if any(sequence.suspect for sequence in self._admitted()):
            return None
        group: list[Sequence] = []
        until: int | None = None
        for sequence in self._considered():
            if len(group) >= self._free_slots() or until is not None:
                break
            if not self._ready(sequence) or self._shares(sequence, group):
                continue
            if group and not self._fits(group, sequence, budget):
                break
            if not self._room_for([*group, sequence]):
                break
            group.append(sequence)
            if sequence.suspect:
                break
            until = self._branching(sequence) if len(group) == 1 else None
        if not group:
            return None
        prefill = self._begin(group, until)
        for sequence in group:
            self.waiting.take(sequence)
        return prefill

    def _begin(self, group: list[Sequence], until: int | None) -> Prefill:
        first = [sequence for sequence in group if sequence.cached is None]
        prefill = Prefill(self.model, self.prefix, group, until)
        self.prompt_tokens += sum(len(sequence.request.prompt) for sequence in first)
        self.cached_tokens += sum(sequence.cached or 0 for sequence in first)
        self._apportion([*self._admitted(), *group])
        return prefill

    def _constrain(self) -> list[Failed]:
        """Have the grammars compiled of requests that may be next; some may be of no use."""
        failed = []
        for sequence in list(self._considered()):
            if sequence.bound:
                continue
            if sequence.grammar is None:
                sequence.grammar = self.constraints.compile(sequence.request.grammar or "")
            if not sequence.grammar.done():
                continue
            try:
                sequence.constrain(sequence.grammar.result())
            except ValueError as error:
                self.abort([sequence.id])
                failed.append(Failed(sequence.id, str(error)))
        return failed

    def _considered(self) -> Iterator[Sequence]:
        return itertools.islice(self.waiting, MOST_CONSIDERED)

    def _ready(self, sequence: Sequence) -> bool:
        """Whether a waiting request's grammar, and all that can be had of its prefix, is here."""
        if sequence.read is not None:
            if not sequence.read.done:
                return False
            self._take_in(sequence, sequence.read)
        if self._on_its_way(sequence):
            return False
        if not sequence.fetched:
            sequence.fetched = True
            sequence.read = self.prefix.fetch(sequence.usable_keys)
        return sequence.read is None and sequence.bound

    def _take_in(self, sequence: Sequence, read: BlockRead) -> None:
        keys = sequence.usable_keys
        before = self.prefix.known(keys)
        self.prefix.take_in(sequence.request.prompt, keys, read)
        sequence.read = None
        # A long prompt is read in portions.
        sequence.fetched = self.prefix.known(keys) == before
        self._hold(sequence)

    def _hold(self, sequence: Sequence) -> None:
        """Keep what is cached of a waiting request's prefix until it is used."""
        self.prefix.let_go(sequence.held)
        sequence.held = self.prefix.chain(sequence.usable_keys)
        self.prefix.hold(sequence.held)

    def _on_its_way(self, sequence: Sequence) -> bool:
        """Whether others compute or read a part of a request's prefix that is not cached yet."""
        keys = sequence.usable_keys
        known = self.prefix.known(keys)
        if known == len(keys):
            return False
        coming = [
            min(common_blocks(keys, other.keys), blocks)
            for prefill in self.prefills
            for other, blocks in prefill.covers
        ]
        coming += [
            common_blocks(keys, other.usable_keys)
            for other in self._considered()
            if other.read is not None and keys[known] in other.read.keys
        ]
        return any((blocks - known) * BLOCK >= LEAST_SHARED for blocks in coming)

    def _shares(self, sequence: Sequence, group: list[Sequence]) -> bool:
        """Whether a request had better wait for the part of its prompt that `group` computes."""
        keys = sequence.usable_keys
        known = self.prefix.known(keys)
        shared = (common_blocks(keys, other.usable_keys) - known for other in group)
        return any(blocks * BLOCK >= LEAST_SHARED for blocks in shared)

    def _branching(self, sequence: Sequence) -> int | None:
        """Where, in tokens, the prompts of others that wait part from this one's, if worth it."""
        keys = sequence.usable_keys
        known = self.prefix.known(keys)
        others = [other for other in self._considered() if other is not sequence]
        shared = [common_blocks(keys, s.usable_keys) for s in others[: self._free_slots() - 1]]
        beyond = [blocks for blocks in shared if blocks > known]
        if not beyond or min(beyond) > self.prefix.capacity:
            return None
        saved = (min(beyond) - known) * BLOCK * len(beyond)
        return min(beyond) * BLOCK if saved >= LEAST_SHARED else None

    def _known(self, sequence: Sequence) -> int:
        """Tokens of a waiting request's prompt that are cached."""
        return self.prefix.known(sequence.usable_keys) * BLOCK

    def _await_threads(self) -> None:
        """Let a little time pass if nothing is to be done but to wait for disk or compiler."""
        for sequence in self._considered():
            if sequence.read is not None:
                sequence.read.wait(THREADS_WAIT)
                return
            if sequence.grammar is not None and not sequence.bound:
                wait([sequence.grammar], THREADS_WAIT)
                return

    @property
    def _kv_room(self) -> int:
        """Bytes of the KV limit that may be used now."""
        return int(self.kv_limit * self.caution.share)

    def _room_for(self, new: list[Sequence]) -> bool:
        """Whether `new` can be expected to fit the KV limit beside what is admitted."""
        admitted = self._admitted()
        needed = self._cost([s.expected_length for s in (*admitted, *new)])
        return needed <= self._kv_room or not (admitted or len(new) > 1)

    def _admitted(self) -> list[Sequence]:
        return [*self.batch.rows, *(s for prefill in self.prefills for s in prefill.sequences)]

    def _make_room(self) -> None:
        """Take the newest requests back out while the next step might exceed the KV limit.

        They keep their tokens, start over when there is room, and come out the same.
        """
        if not self.batch.busy:
            return
        while len(admitted := self._admitted()) > 1:
            if self._needed(admitted) <= self._kv_room:
                break
            self._preempt_newest()
        self._apportion(admitted)

    def _needed(self, admitted: list[Sequence]) -> int:
        """Bytes of the caches of these requests after the next step."""
        return self._cost([sequence.length + 1 for sequence in admitted])

    def _cost(self, lengths: list[int]) -> int:
        """Bytes of the caches of requests of these lengths, padded as far as may be."""
        longest = max(lengths, default=0)
        if not self.model.mixes:
            return self.model.kv_cost.bytes(len(lengths), longest)
        padded = [min(longest, most_padded(length)) for length in lengths]
        return sum(self.model.kv_cost.bytes(1, length) for length in padded)

    def _apportion(self, admitted: Many[Sequence] = ()) -> None:
        """Leave the prefix cache what these requests do not need."""
        left = self._kv_room - self._needed(list(admitted))
        self.prefix.limit = max(0, min(self.prefix_limit, left))
        self.prefix.shrink(self.prefix.limit)

    def _preempt_newest(self) -> None:
        newest = self.prefills.pop().sequences if self.prefills else self.batch.rows[-1:]
        self.preempted += len(newest)
        for sequence in reversed(newest):
            self.waiting.put_back(sequence.anew())
        self.batch.leave(newest)

    def _fits(self, group: list[Sequence], more: Sequence, budget: int) -> bool:
        """Whether `more` may be prefilled together with `group` in a chunk of `budget` tokens."""
        members = [*group, more]
        if any(s.scored or s.limit <= s.launched for s in members):
            return False
        lengths = [len(s.request.prompt) - 1 for s in members]
        if not alike(min(lengths), max(lengths)):
            return False
        if not self.prefix.layout.sliceable and max(lengths) >= GROUPED_SNAPSHOTS:
            return False
        missing = [
            max(1, length - self._known(s)) for length, s in zip(lengths, members, strict=True)
        ]
        work = max(missing) * len(missing)
        return work <= budget and work <= MOST_PADDING * sum(missing)
