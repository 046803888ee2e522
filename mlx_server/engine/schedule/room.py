"""How many bytes of KV cache requests need, and what is left for the prefix cache."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Protocol

from mlx_server.engine.run.kv import KvCost
from mlx_server.engine.schedule.backoff import KvBackoff


class Sized(Protocol):
    @property
    def length(self) -> int: ...

    @property
    def expected_length(self) -> int: ...


class KvRoom:
    """The KV limit, in bytes, for running requests and the prefix cache; what runs comes first.

    `padded` tells from the lengths of sequences what they may be padded to. A step adds at most
    `step` tokens to a row.
    """

    def __init__(
        self,
        cost: KvCost,
        limit: int,
        prefix_limit: int,
        backoff: KvBackoff,
        padded: Callable[[list[int]], list[int]],
        step: int = 1,
    ) -> None:
        self._cost = cost
        self._limit = limit
        self._prefix_limit = prefix_limit
        self._backoff = backoff
        self._padded = padded
        self._step = step

    @property
    def usable(self) -> int:
        return int(self._limit * self._backoff.share)

    def has_room(self, admitted: Many[Sized], new: Many[Sized]) -> bool:
        """Whether `new` can be expected to fit beside `admitted`; a single request always does."""
        if not admitted and len(new) == 1:
            return True
        return self._bytes([one.expected_length for one in (*admitted, *new)]) <= self.usable

    def too_many(self, admitted: Many[Sized]) -> bool:
        """Whether the next step of `admitted` might exceed the limit."""
        return len(admitted) > 1 and self._next(admitted) > self.usable

    def left_for_prefixes(self, admitted: Many[Sized]) -> int:
        """Bytes that `admitted` leave the prefix cache."""
        return max(0, min(self._prefix_limit, self.usable - self._next(admitted)))

    def _next(self, admitted: Many[Sized]) -> int:
        return self._bytes([one.length + self._step for one in admitted])

    def _bytes(self, lengths: list[int]) -> int:
        return sum(self._cost.bytes(1, length) for length in self._padded(lengths))
