"""Finds the end of a streamed block of calls."""

import re

from mlx_server.models.text.syntax import CallSyntax
from mlx_server.services.output.pieces import overlap

QUOTE = '"'


class BlockScan:
    def __init__(self, syntax: CallSyntax) -> None:
        self._end = syntax.end
        self._closing = dict(syntax.shields)
        self._inside = ""
        """What closes the shield that is open."""
        marks = sorted((*self._closing, *filter(None, [syntax.end])), key=len, reverse=True)
        self._marks = marks
        self._outside = re.compile("|".join(map(re.escape, marks)) or "(?!)")

    def push(self, text: str) -> tuple[int, bool]:
        """(characters of `text` that are certain, whether the block's end follows them). Push the
        others again before new text.
        """
        position = 0
        while True:
            if self._inside:
                position, closed = self._skip_shield(text, position)
                if not closed:
                    return position, False
            found = self._outside.search(text, position)
            if found is None:
                held = max((overlap(text[position:], mark) for mark in self._marks), default=0)
                return len(text) - held, False
            if found[0] == self._end:
                return found.start(), True
            self._inside = self._closing[found[0]]
            position = found.end()

    def _skip_shield(self, text: str, position: int) -> tuple[int, bool]:
        closing = self._inside
        end = text.find(closing, position)
        while closing == QUOTE and end >= 0 and _is_escaped(text, position, end):
            end = text.find(closing, end + 1)
        if end >= 0:
            self._inside = ""
            return end + len(closing), True
        if closing == QUOTE:
            return len(text) - _is_escaped(text, position, len(text)), False
        return len(text) - overlap(text[position:], closing), False


def _is_escaped(text: str, start: int, position: int) -> bool:
    before = text[start:position]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
