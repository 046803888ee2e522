"""The order in which waiting requests are admitted."""

import itertools
from collections import deque
from collections.abc import Iterator

from mlx_server.engine.schedule.request import WaitingRequest


class WaitingQueue:
    """First come, first served within a priority, with one place per caller in each round.

    Lower priority numbers come first; what was put back comes before all.
    """

    def __init__(self) -> None:
        self._put_back: deque[WaitingRequest] = deque()
        self._lanes: dict[int, dict[str, deque[WaitingRequest]]] = {}

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return bool(self._put_back or self._lanes)

    def __iter__(self) -> Iterator[WaitingRequest]:
        yield from self._put_back
        for priority in sorted(self._lanes):
            rounds = itertools.zip_longest(*self._lanes[priority].values())
            yield from (request for one in rounds for request in one if request is not None)

    def add(self, request: WaitingRequest) -> None:
        """Queue a new request behind those of its caller."""
        callers = self._lanes.setdefault(request.request.priority, {})
        callers.setdefault(request.request.caller, deque()).append(request)

    def put_back(self, request: WaitingRequest) -> None:
        self._put_back.appendleft(request)

    def take(self, request: WaitingRequest) -> None:
        """Take a request out; its caller's turn comes again after all others'."""
        if request in self._put_back:
            self._put_back.remove(request)
            return
        priority, caller = request.request.priority, request.request.caller
        callers = self._lanes[priority]
        line = callers.pop(caller)
        line.remove(request)
        if line:
            callers[caller] = line  # a dictionary keeps order: now the last
        if not callers:
            del self._lanes[priority]

    def remove(self, ids: frozenset[int]) -> list[WaitingRequest]:
        gone = [request for request in self if request.id in ids]
        self._put_back = deque(s for s in self._put_back if s.id not in ids)
        for priority, callers in list(self._lanes.items()):
            for caller, line in list(callers.items()):
                callers[caller] = deque(s for s in line if s.id not in ids)
                if not callers[caller]:
                    del callers[caller]
            if not callers:
                del self._lanes[priority]
        return gone
