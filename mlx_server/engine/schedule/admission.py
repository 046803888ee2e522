"""Which waiting requests start next, and whether they start together.

Prompts with a common beginning compute it once: a request whose beginning is being computed for
another, or read from the disk, is passed over until it is in the prefix cache.
"""

import itertools
from collections.abc import Sequence as Many
from concurrent.futures import wait

from mlx_server.engine.cache.prefix import BLOCK, common_blocks
from mlx_server.engine.plan import Begin, Fetch
from mlx_server.engine.protocol import Failed, Sharing
from mlx_server.engine.run.groups import alike
from mlx_server.engine.run.runner import Runner, covered_blocks
from mlx_server.engine.schedule.request import WaitingRequest
from mlx_server.engine.schedule.room import KvRoom, Sized
from mlx_server.engine.schedule.waiting import WaitingQueue

MOST_PADDING = 1.5
"""Prompts prefill together while padding makes the work no more than this times as large."""
MOST_CONSIDERED = 64
"""Waiting requests that a turn looks at."""
LEAST_SHARED = 48
"""Tokens that must be saved for prompts to be computed one after another rather than at once."""
GROUPED_SNAPSHOTS = 4 * BLOCK
"""Prompts from this length on prefill alone where the prefix cache needs snapshots of them."""


class Admission:
    """Takes requests from `waiting` as their grammars and prefixes are ready and there is room.

    `suspects` are the ids of requests that run alone, since a turn has failed with them in it.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        runner: Runner,
        room: KvRoom,
        suspects: set[int],
        max_batch: int,
    ) -> None:
        self._waiting = waiting
        self._runner = runner
        self._prefix = runner.prefix
        self._room = room
        self._suspects = suspects
        self._max_batch = max_batch
        self._loads: list[int] = []
        self._fetches: list[Fetch] = []

    def compile_grammars(self) -> list[Failed]:
        """Start compiling what may be needed next; returns requests whose grammar is unusable."""
        failed = []
        for request in self.considered():
            if request.bound or request.request.grammar is None:
                continue
            request.grammar = self._runner.grammars.compile(request.request.grammar)
            if not request.grammar.done():
                continue
            try:
                request.bind(request.grammar.result())
            except ValueError as error:
                failed.append(Failed(request.id, str(error)))
        return failed

    def admit(self, admitted: Many[Sized], budget: int) -> Begin | None:
        """The first requests that can start beside `admitted`, if any.

        `budget` is how many prompt tokens several may have to compute at once.
        """
        if any(s.id in self._suspects for s in self._runner.sequences):
            return None
        group: list[WaitingRequest] = []
        until: int | None = None
        free = self._max_batch - len(admitted)
        for request in self.considered():
            if len(group) >= free or until is not None:
                break
            if not self._is_ready(request) or self._shares(request, group):
                continue
            if group and not self._fits(group, request, budget):
                break
            if not self._room.has_room(admitted, [*group, request]):
                break
            group.append(request)
            if request.id in self._suspects:
                break
            until = self._branch_point(request, free) if len(group) == 1 else None
        for request in group:
            self._waiting.take(request)
        return Begin([request.start for request in group], until) if group else None

    def take_reads(self) -> tuple[list[int], list[Fetch]]:
        loads, self._loads = self._loads, []
        fetches, self._fetches = self._fetches, []
        return loads, fetches

    def considered(self) -> list[WaitingRequest]:
        return list(itertools.islice(self._waiting, MOST_CONSIDERED))

    def known_tokens(self, keys: list[bytes]) -> int:
        return self._prefix.known(keys) * BLOCK

    def some_short_prompt(self, places: int, tokens: int) -> bool:
        """Whether a waiting prompt with `tokens` or fewer to compute has a place."""
        if places >= self._max_batch:
            return False
        missing = (one.length - self.known_tokens(one.keys) for one in self.considered())
        return any(one <= tokens for one in missing)

    def await_threads(self, seconds: float) -> None:
        """Block for at most `seconds` on the disk read or compiler that is waited for."""
        for request in self.considered():
            if (read := self._runner.waiting.reads.get(request.id)) is not None:
                read.wait(seconds)
                return
            if request.grammar is not None and not request.bound:
                wait([request.grammar], seconds)
                return

    def _is_ready(self, request: WaitingRequest) -> bool:
        if request.wanted and not self._is_loaded(request):
            return False
        if self._prefix_pending(request):
            return False
        known = self._prefix.known(request.keys)
        if known > request.fetched_after:  # a long prompt is read in portions
            request.fetched_after = known
            request.wanted = self._prefix.on_disk(request.keys)
            if request.wanted:
                prompt = request.request.prompt
                self._fetches.append(Fetch(request.id, prompt, request.keys, request.wanted))
        return request.bound and not request.wanted

    def _is_loaded(self, request: WaitingRequest) -> bool:
        """Whether what was fetched is in the prefix cache; plans its load once it is read."""
        read = self._runner.waiting.reads.get(request.id)
        if read is None:
            request.wanted = []
            return True
        if read.done:
            self._loads.append(request.id)
        return False

    def _prefix_pending(self, request: WaitingRequest) -> bool:
        keys = request.keys
        known = self._prefix.known(keys)
        if known == len(keys):
            return False
        coming = [
            min(common_blocks(keys, other.keys), blocks)
            for other, blocks in covered_blocks(self._runner.prefills)
        ]
        coming += [
            common_blocks(keys, other.keys)
            for other in self.considered()
            if keys[known] in other.wanted
        ]
        return any((blocks - known) * BLOCK >= LEAST_SHARED for blocks in coming)

    def _shares(self, request: WaitingRequest, group: list[WaitingRequest]) -> bool:
        known = self._prefix.known(request.keys)
        shared = (common_blocks(request.keys, other.keys) - known for other in group)
        return any(blocks * BLOCK >= LEAST_SHARED for blocks in shared)

    def _branch_point(self, request: WaitingRequest, free: int) -> int | None:
        """Tokens shared with other waiting prompts, if sharing them saves enough."""
        known = self._prefix.known(request.keys)
        others = [other for other in self.considered() if other is not request]
        shared = [common_blocks(request.keys, other.keys) for other in others[: free - 1]]
        beyond = [blocks for blocks in shared if blocks > known]
        if not beyond or min(beyond) > self._prefix.capacity:
            return None
        saved = (min(beyond) - known) * BLOCK * len(beyond)
        return min(beyond) * BLOCK if saved >= LEAST_SHARED else None

    def _fits(self, group: list[WaitingRequest], more: WaitingRequest, budget: int) -> bool:
        members = [*group, more]
        if any(one.scored or not one.decodes for one in members):
            return False
        lengths = [one.length - 1 for one in members]
        if not self._may_share(lengths):
            return False
        if not self._prefix.layout.sliceable and max(lengths) >= GROUPED_SNAPSHOTS:
            return False
        missing = [max(1, one.length - 1 - self.known_tokens(one.keys)) for one in members]
        work = max(missing) * len(missing)
        return work <= budget and work <= MOST_PADDING * sum(missing)

    def _may_share(self, lengths: list[int]) -> bool:
        """Whether prompts of these lengths may be computed together, and then decode together."""
        sharing = self._runner.model.batching
        if sharing.prefill is Sharing.NONE or sharing.decode is Sharing.NONE:
            return False
        if sharing.decode is Sharing.EQUAL:
            return len(set(lengths)) == 1
        return alike(min(lengths), max(lengths))
