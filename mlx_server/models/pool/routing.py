"""Which of several engines gets a request: the one that computed its beginning, unless busier.

The front knows no cache, only what it has sent where; what an engine dropped since is computed
again. (SGLang's cache-aware router does the same with a tree of texts.)
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

STEP = 32
"""Tokens between two marks of a prompt."""
LONG, LONG_STEP = 512, 256
"""From where marks are further apart."""
DIGEST_BYTES = 16
MOST_MARKS = 16_384
"""Kept for each engine; the longest unused go first."""
LOAD = 128
"""Prompt tokens that are computed again rather than join one more request."""

E = TypeVar("E")


class Mark(NamedTuple):
    """The beginning of a prompt, up to `tokens`."""

    tokens: int
    digest: bytes


def marks(prompt: list[int]) -> list[Mark]:
    tokens = array("I", prompt)
    found = []
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    start = 0
    while (end := start + (STEP if start < LONG else LONG_STEP)) <= len(tokens):
        digest.update(tokens[start:end].tobytes())
        found.append(Mark(end, digest.digest()))
        start = end
    return found


class SentPrefixes:
    """The beginnings of prompts that one engine was sent."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def known(self, prompt: Sequence[Mark]) -> int:
        """How many tokens of `prompt` it has been sent before."""
        return next((m.tokens for m in reversed(prompt) if m.digest in self._digests), 0)

    def add(self, prompt: Sequence[Mark]) -> None:
        # The first last: what many prompts share is dropped last.
        for mark in reversed(prompt):
            self._digests[mark.digest] = None
            self._digests.move_to_end(mark.digest)
        while len(self._digests) > MOST_MARKS:
            self._digests.popitem(last=False)

    def clear(self) -> None:
        self._digests.clear()


def cheapest(engines: Sequence[E], known: Callable[[E], int], load: Callable[[E], int]) -> E:
    """The engine that has the least to compute; the first of equals.

    `known` is how many tokens of the prompt an engine has, `load` how many requests it works on.
    """
    return min(engines, key=lambda engine: load(engine) * LOAD - known(engine))
