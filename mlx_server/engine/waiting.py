"""The order in which waiting requests are admitted."""

from collections import deque
from collections.abc import Iterator

from mlx_server.engine.batch import Sequence


class WaitingQueue:
    """First come, first served within a priority, and in turns between callers.

    A caller with many requests gets one place in each round, as every other caller does, so that
    nobody starves. Lower priority numbers come first. What was put back comes before all.
    """

    def __init__(self) -> None:
        self._put_back: deque[Sequence] = deque()
        self._lanes: dict[int, dict[str, deque[Sequence]]] = {}

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return bool(self._put_back or self._lanes)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._put_back
        for callers in self._lanes.values():
            for line in callers.values():
                yield from line

    def add(self, sequence: Sequence) -> None:
        """Queue a new request behind those of its caller."""
        callers = self._lanes.setdefault(sequence.request.priority, {})
        callers.setdefault(sequence.request.caller, deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Return a request that had been admitted; it is the next to come out."""
        self._put_back.appendleft(sequence)

    def peek(self) -> Sequence:
        """The next request. Raises IndexError when none waits."""
        if self._put_back:
            return self._put_back[0]
        _, callers = self._first_lane()
        return next(iter(callers.values()))[0]

    def pop(self) -> Sequence:
        """Take the next request; its caller's turn comes again after all others'."""
        if self._put_back:
            return self._put_back.popleft()
        priority, callers = self._first_lane()
        caller = next(iter(callers))
        line = callers.pop(caller)
        sequence = line.popleft()
        if line:
            callers[caller] = line  # a dictionary keeps order: now the last
        if not callers:
            del self._lanes[priority]
        return sequence

    def remove(self, ids: frozenset[int]) -> None:
        """Forget these requests."""
        self._put_back = deque(s for s in self._put_back if s.id not in ids)
        left = [s for callers in self._lanes.values() for line in callers.values() for s in line]
        self._lanes = {}
        for sequence in left:
            if sequence.id not in ids:
                self.add(sequence)

    def _first_lane(self) -> tuple[int, dict[str, deque[Sequence]]]:
        if not self._lanes:
            raise IndexError("no request waits")
        priority = min(self._lanes)
        return priority, self._lanes[priority]
