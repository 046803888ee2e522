"""What an engine does when nothing has been asked of it for a while."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

REST_SECONDS = 300.0
"""After which weights are no longer kept in memory at all costs."""
RELEASE_SECONDS = 3.0
"""After which freed buffers go back to the system: a request would only ask for them again."""


@dataclass(frozen=True, slots=True)
class Chore:
    """`run` after `delay` seconds without work; it returns after how many more to run again."""

    delay: float
    run: Callable[[], float | None]


class IdleTime:
    """Runs each chore once in every stretch of idle time, unless work comes first."""

    def __init__(
        self, chores: Iterable[Chore], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._chores = list(chores)
        self._clock = clock
        self._due: dict[int, float] = {}
        self.begin()

    def begin(self) -> None:
        """Work has just ended."""
        now = self._clock()
        self._due = {i: now + chore.delay for i, chore in enumerate(self._chores)}

    def left(self) -> float | None:
        """Seconds until a chore is due; None if all are done."""
        return max(0.0, min(self._due.values()) - self._clock()) if self._due else None

    def spend(self) -> None:
        """Run the chores that are due."""
        now = self._clock()
        for i in [i for i, due in self._due.items() if due <= now]:
            again = self._chores[i].run()
            if again is None:
                del self._due[i]
            else:
                self._due[i] = self._clock() + again
