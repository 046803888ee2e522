"""The masks of decode steps, computed in a thread while the device computes the logits."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Allowed, Constraint, Masker

MOST_PROCESSORS = 8


class MaskThread:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._masker: Masker | None = None

    def submit(
        self, rows: "Mapping[int, Constraint]", guesses: Mapping[int, list[int]]
    ) -> "Future[Allowed]":
        """What `rows`, by place in the batch, may take after their tokens so far, and after each of
        their `guesses`, whose places follow.
        """
        new = [
            (place, constraint, constraint.take_new(), guesses.get(place, []))
            for place, constraint in rows.items()
        ]
        return self._thread.submit(self._compute, new)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compute(self, new: "list[tuple[int, Constraint, list[int], list[int]]]") -> "Allowed":
        from mlx_server.engine.grammar.grammar import Asked, Masker

        if self._masker is None:
            self._masker = Masker(min(MOST_PROCESSORS, os.cpu_count() or 1))
        return self._masker.compute([Asked(*one) for one in new])


class Masks:
    """The masks of one step."""

    def __init__(self, thread: MaskThread) -> None:
        self._thread = thread
        self._begun = False
        self._allowed: Future[Allowed] | None = None

    def begin(
        self, rows: "Mapping[int, Constraint]", guesses: Mapping[int, list[int]] | None = None
    ) -> None:
        """By place in the batch; other rows are free."""
        self._begun = True
        if rows:
            self._allowed = self._thread.submit(rows, guesses or {})

    def wait(self) -> "Allowed | None":
        """None where all rows are free."""
        if not self._begun:
            raise RuntimeError("the masks of this step have not been begun")
        return None if self._allowed is None else self._allowed.result()
