"""The masks of decode steps, computed in a thread while the device computes the logits."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Allowed, Constraint, Masker, NewTokens

MOST_PROCESSORS = 8


class MaskThread:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._masker: Masker | None = None

    def submit(self, rows: "dict[int, Constraint]") -> "Future[Allowed]":
        """What `rows`, by place in the batch, may take after their tokens so far."""
        new = [(place, constraint, constraint.take_new()) for place, constraint in rows.items()]
        return self._thread.submit(self._compute, new)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compute(self, new: "list[NewTokens]") -> "Allowed":
        if self._masker is None:
            from mlx_server.engine.grammar.grammar import Masker

            self._masker = Masker(min(MOST_PROCESSORS, os.cpu_count() or 1))
        return self._masker.compute(new)


class Masks:
    """The masks of one step."""

    def __init__(self, thread: MaskThread) -> None:
        self._thread = thread
        self._begun = False
        self._allowed: Future[Allowed] | None = None

    def begin(self, rows: "dict[int, Constraint]") -> None:
        """By place in the batch; other rows are free."""
        self._begun = True
        if rows:
            self._allowed = self._thread.submit(rows)

    def wait(self) -> "Allowed | None":
        """None where all rows are free."""
        if not self._begun:
            raise RuntimeError("the masks of this step have not been begun")
        return None if self._allowed is None else self._allowed.result()
