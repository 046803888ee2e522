"""How many tokens to guess for each row, from what passes take and how often guesses come true.

A pass with guesses takes longer, also for the rows that have none. So each row keeps an account:
it may be slowed down by as much as it was sped up before, and a little more. Within that, the pass
wins by which the rows' expected speeds have the largest geometric mean (proportional fairness:
Kelly 1997); it may be the one without guesses.
"""

import heapq
import math
import statistics
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MARGIN = 1.05
"""By how much a pass with guesses must be better, since times vary."""
CREDIT = 0.25
"""Steps that a row may fall behind before it has gained anything."""
TOLERATED = 0.01
"""By how much of a step a pass may always be longer."""
AFTERMATH = 2
"""Steps after a pass with guesses that may take longer because of it."""
MOST_AHEAD = 16.0
"""Steps gained that a row's account holds."""
KEPT = 5
"""Measurements of which the median counts."""
SURPRISE = 2.0
"""How many times what is usual may be charged for a pass or a step: what takes longer has been
interrupted by other things that the machine had to do.
"""
FORGOTTEN = 100
"""Steps after which a time is no longer believed that was not measured again, for each measurement
of it.
"""
GROWTH = 2
"""How many times larger than any before a pass may be."""
SLOPE = 0.03
"""What a token more is taken to cost, as a share of the smallest pass, until that is known."""
DRAFT_STEP = 0.1
"""The same of a token of a draft model for each row."""
SIZES: list[int] = [
    *range(1, 9),
    *range(10, 33, 2),
    *range(36, 65, 4),
    *range(72, 129, 8),
    *range(160, 1025, 32),
]


class Chance(NamedTuple):
    """What could be guessed for a row: up to `most` tokens, the first right with the chance
    `first`, each further one with `then` where those before it are.

    `drafted`: by a draft model, which takes time.
    """

    most: int
    first: float
    then: float
    drafted: bool = False

    def of(self, count: int) -> float:
        """How likely the first `count` are all right."""
        return self.first * self.then ** (count - 1)


class PassTimes:
    """Seconds of a pass by its tokens, measured as it goes."""

    def __init__(self) -> None:
        self._known: dict[int, deque[float]] = {}
        self._measured_at: dict[int, int] = {}
        self._count = 0
        self._times: dict[int, float] = {}
        """The median by size, of what is believed; in rising order."""

    def measured(self, tokens: int, seconds: float) -> None:
        self.age()
        size = _size(tokens)
        self._known.setdefault(size, deque(maxlen=KEPT)).append(seconds)
        self._measured_at[size] = self._count
        self._times = {s: statistics.median_low(self._known[s]) for s in sorted(self._known)}

    def age(self) -> None:
        """Another step has passed."""
        self._count += 1
        for size, at in list(self._measured_at.items()):
            if self._count - at > FORGOTTEN * len(self._known[size]):
                del self._known[size], self._measured_at[size]
                self._times.pop(size, None)

    @property
    def largest(self) -> int:
        """Tokens of the largest pass that is known."""
        return max(self._times, default=0)

    def seconds(self, tokens: int) -> float | None:
        """None while nothing is known."""
        times = self._times
        if not times:
            return None
        size, sizes = _size(tokens), list(times)
        at = bisect_left(sizes, size)
        if at < len(sizes) and sizes[at] == size:
            return times[size]
        if 0 < at < len(sizes):
            low, high = sizes[at - 1], sizes[at]
            share = (size - low) / (high - low)
            return times[low] + share * (times[high] - times[low])
        nearest = sizes[0] if at == 0 else sizes[-1]
        return max(times[sizes[0]] / 2, times[nearest] + SLOPE * times[sizes[0]] * (size - nearest))


class Guessing:
    """Decides for an engine's passes. `padded`: a pass computes as many tokens for each row as for
    the one that has most. `goes_back`: after a wrong guess the right ones before it, and the token
    that they followed, are computed once more.

    A pass with guesses also costs what comes around it: the host does not prepare the next step
    meanwhile, and the first steps after it may have caches to put in order.
    """

    def __init__(self, *, padded: bool, goes_back: bool = False) -> None:
        self._padded = padded
        self._goes_back = goes_back
        self._last_rows = 0
        self._steps, self._passes = PassTimes(), PassTimes()
        self._drafting = PassTimes()
        """Of a token for each of so many rows, drawn by a draft model."""
        self._accounts: dict[int, float] = {}
        """Steps that rows are ahead of where they would be without guesses, by their ids."""
        self._aftermath = 0
        self._early = 0.0
        """Steps gained by reading one before the next was begun."""

    def stepped(self, rows: int, seconds: float) -> None:
        """Learn from a step without guesses; the first one of a batch is not like the others."""
        self._passes.age()
        if rows == self._last_rows:
            self._steps.measured(rows, seconds)
        self._last_rows = rows
        self._settle(rows, seconds, 1)
        self._accounts = {id_: n + TOLERATED * (n < 0) for id_, n in self._accounts.items()}

    def settled(self, rows: int, seconds: float) -> None:
        """The step under way was read, and no other begun meanwhile. On a CPU this takes next to
        no time, and it is the next one's beginning that takes a step's.
        """
        base = self._steps.seconds(rows)
        self._early = 1 - min(SURPRISE, seconds / base) if base else 0.0

    def started(self, rows: int, seconds: float) -> None:
        """A step was begun, with no other under way to read meanwhile."""
        self._settle(rows, seconds, 0)

    def drafted(self, rows: int, steps: int, seconds: float) -> None:
        """Learn from so many tokens that a draft model drew for each of `rows`."""
        self._drafting.measured(rows, seconds / steps)

    def verified(
        self, taken: Mapping[int, int], tokens: int, seconds: float, drafting: float = 0.0
    ) -> None:
        """Learn from a pass of so many `tokens`, of which rows took `taken` by their ids, after so
        many seconds of `drafting`.
        """
        usual = self.expected(tokens, len(taken)) or seconds
        self._passes.measured(tokens, seconds)
        self.charge(taken, min(seconds, SURPRISE * usual) + drafting)

    def expected(self, tokens: int, rows: int) -> float:
        """Seconds of a pass of `rows` with so many tokens; 0 while nothing is known."""
        base = self._steps.seconds(rows)
        return base * self._cost(tokens, rows, base) if base else 0.0

    def charge(self, taken: Mapping[int, int], seconds: float) -> None:
        """Have rows, by their ids, pay for a pass of which they took so many tokens."""
        self._last_rows = 0
        self._aftermath = AFTERMATH
        base = self._steps.seconds(len(taken))
        if not base:
            return
        cost = seconds / base - TOLERATED - self._early
        self._early = 0.0
        self._accounts = {
            id_: min(MOST_AHEAD, self._accounts.get(id_, 0.0) + count - cost)
            for id_, count in taken.items()
        }

    def allot(self, rows: Sequence[int], chances: Mapping[int, Chance]) -> dict[int, int]:
        """How many tokens to guess, by the ids of rows."""
        base = self._steps.seconds(len(rows))
        if not base or not chances:
            return {}
        # How many steps the pass may take for each row, and how many tokens one needs once more.
        allowed = {id_: CREDIT + self._accounts.get(id_, 0.0) + 1 for id_ in rows}
        # A wrong idea of what a pass takes shall not be dear.
        explored = max(GROWTH * self._passes.largest, 2 * len(rows))
        drafted, depth, again = 0, 0, 0.0
        best, most, deepest, gained = len(rows) * math.log(MARGIN), 0, 0, 0.0
        order: list[int] = []
        gains = [(-math.log1p(one.first), id_, 1, 1.0) for id_, one in chances.items()]
        heapq.heapify(gains)
        while gains:
            gain, id_, count, expected = heapq.heappop(gains)
            gained -= gain
            order.append(id_)
            chance = chances[id_]
            allowed[id_] += chance.of(count)
            again = max(again, expected - count * chance.of(count))
            if count < chance.most:
                expected += chance.of(count)
                more = math.log1p(chance.of(count + 1) / expected)
                heapq.heappush(gains, (-more, id_, count + 1, expected))
            deepest = max(deepest, count)
            tokens = len(rows) * (1 + deepest) if self._padded else len(rows) + len(order)
            if tokens > explored:
                break
            if chances[id_].drafted:
                drafted, depth = drafted + (count == 1), max(depth, count)
            cost = self._cost(tokens, len(rows), base)
            if self._goes_back:
                cost += max(0.0, cost - 1) * again / deepest
            cost += self._draft_cost(drafted, depth, base)
            value = gained - len(rows) * math.log(cost)
            if value > best and cost - TOLERATED <= min(allowed.values()):
                best, most = value, len(order)
        return dict(Counter(order[:most]))

    def _settle(self, rows: int, seconds: float, taken: int) -> None:
        """Have rows pay for what a pass with guesses has left to do."""
        base, early = self._steps.seconds(rows), self._early
        self._early = 0.0
        if not base or not (self._aftermath or early):
            return
        self._aftermath = max(0, self._aftermath - taken)
        ahead = taken + early - min(SURPRISE, seconds / base)
        self._accounts = {id_: min(MOST_AHEAD, n + ahead) for id_, n in self._accounts.items()}

    def _cost(self, tokens: int, rows: int, base: float) -> float:
        """Of a pass, in steps of `base` seconds."""
        seconds = self._passes.seconds(tokens)
        return 1 + SLOPE * (tokens - rows) if seconds is None else seconds / base

    def _draft_cost(self, rows: int, steps: int, base: float) -> float:
        """Of `steps` tokens for each of `rows`, in steps of the model."""
        if not rows:
            return 0.0
        seconds = self._drafting.seconds(rows)
        return steps * (DRAFT_STEP if seconds is None else seconds / base)


def _size(tokens: int) -> int:
    return SIZES[min(bisect_left(SIZES, tokens), len(SIZES) - 1)]
