"""Finds where tool calls begin in an answer."""

import re
from collections.abc import Iterable
from enum import Enum, auto

from mlx_server.models.text.syntax import CallSyntax
from mlx_server.services.output.pieces import overlap

NEVER = re.compile(r"(?!)")


class Opening(Enum):
    MARKER = auto()
    """Calls follow it."""
    BARE = auto()
    """The first call's own beginning."""
    SHAPE = auto()
    """A bracket that may begin a call."""


class Openings:
    def __init__(self, syntax: CallSyntax) -> None:
        self._markers = [one for one in (syntax.start, *syntax.others) if one]
        self._literals = [*self._markers, *syntax.bare]
        brackets = "{[" if syntax.anywhere else "[" if syntax.pythonic else ""
        self._kinds = dict.fromkeys(self._markers, Opening.MARKER)
        self._kinds |= dict.fromkeys(syntax.bare, Opening.BARE)
        self._kinds |= dict.fromkeys(brackets, Opening.SHAPE)
        self._pattern = _any_of([*self._literals, *brackets])

    def at_start(self, text: str) -> tuple[Opening, str] | None:
        """Whether the answer's `text` begins with one."""
        match = self._pattern.match(text)
        if match is not None:
            return self._kinds[match[0]], match[0]
        return (Opening.SHAPE, text[0]) if text[0] in "{[" else None

    def may_come(self, text: str) -> bool:
        """Whether more of `text` may show that it begins with one."""
        return any(one != text and one.startswith(text) for one in self._literals)

    def find(self, text: str) -> tuple[int, Opening, str] | None:
        match = self._pattern.search(text)
        return None if match is None else (match.start(), self._kinds[match[0]], match[0])

    def held(self, text: str) -> int:
        """How many characters at the end could begin one."""
        return max((overlap(text, one) for one in self._literals), default=0)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else NEVER
