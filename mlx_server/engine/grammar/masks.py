"""Grammars compiled, and masks computed, in threads beside the engine's loop.

llguidance is imported, and told the model's tokens, when the first request with a grammar comes: it
keeps some 50 MB for 50,000 tokens, which an engine that never sees one need not have.
"""

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Allowed, Constraint, Grammar, Masker, Vocabulary

COMPILERS = 2
"""Threads that compile: a grammar that takes seconds leaves the others one."""
MOST_GRAMMARS = 64
"""Compiled grammars that are kept for requests to come."""
MOST_MASKERS = 8
"""Processors that compute the masks of a step."""


class Constraints:
    """The grammars of one model, compiled once each, and the thread that computes masks."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """`vocab_size` is the width of the model's logits."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._compilers = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._vocabulary: Future[Vocabulary] | None = None
        self._masker: Masker | None = None
        self._grammars: OrderedDict[str, Future[Grammar]] = OrderedDict()

    def compile(self, text: str) -> "Future[Grammar]":
        """The grammar `text`, once it is compiled; its exception says why it cannot be."""
        if text not in self._grammars:
            self._grammars[text] = self._compilers.submit(_compiled, self._read_vocabulary(), text)
            while len(self._grammars) > MOST_GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(text)
        return self._grammars[text]

    def masks(self) -> "Masks":
        """Masks for a step, to be computed once its rows' tokens so far are known."""
        return Masks(self)

    def allowed(self, rows: "dict[int, Constraint]") -> "Future[Allowed]":
        """What each of `rows`, by place in the batch, may take after the tokens it was told."""
        told = [(place, constraint, constraint.told()) for place, constraint in rows.items()]
        return self._masks.submit(self._allowed, told)

    def close(self) -> None:
        """Begin nothing more."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _read_vocabulary(self) -> "Future[Vocabulary]":
        if self._vocabulary is None:
            self._vocabulary = self._compilers.submit(_vocabulary, self._folder, self._vocab_size)
        return self._vocabulary

    def _allowed(self, told: "list[tuple[int, Constraint, list[int]]]") -> "Allowed":
        if self._masker is None:
            from mlx_server.engine.grammar.grammar import Masker

            self._masker = Masker(min(MOST_MASKERS, os.cpu_count() or 1))
        return self._masker.compute(told)


def _vocabulary(folder: Path, size: int) -> "Vocabulary":
    from mlx_server.engine.grammar.grammar import Vocabulary

    return Vocabulary(folder, size)


def _compiled(vocabulary: "Future[Vocabulary]", text: str) -> "Grammar":
    from mlx_server.engine.grammar.grammar import Grammar

    return Grammar(vocabulary.result(), text)


class Masks:
    """The masks of one step, computed while the device computes its logits."""

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._begun = False
        self._allowed: Future[Allowed] | None = None

    def begin(self, rows: "dict[int, Constraint]") -> None:
        """Have them computed for `rows`, by place in the batch; other rows are free."""
        self._begun = True
        if rows:
            self._allowed = self._constraints.allowed(rows)

    def wait(self) -> "Allowed | None":
        """What the rows may take; None where all are free."""
        if not self._begun:
            raise RuntimeError("nobody has begun with the masks of this step")
        return None if self._allowed is None else self._allowed.result()
