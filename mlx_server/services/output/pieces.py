"""Pieces of a completion, and the buffer they are cut from."""

from enum import Enum, auto
from typing import NamedTuple


class Kind(Enum):
    TEXT = auto()
    REASONING = auto()
    CALL = auto()
    """`ARGUMENTS` follow."""
    ARGUMENTS = auto()
    HIDDEN = auto()


class Piece(NamedTuple):
    """`width` counts the completion's characters it was read from."""

    kind: Kind
    text: str
    width: int


class PieceBuffer:
    """Text not understood yet, and pieces cut off its front; shared by readers."""

    def __init__(self) -> None:
        self.text = ""
        self.pieces: list[Piece] = []

    def cut(self, kind: Kind, length: int) -> None:
        if length:
            text = self.text
            self.pieces.append(Piece(kind, text[:length], length))
            self.text = text[length:]

    def hide(self, length: int) -> None:
        if length:
            self.pieces.append(Piece(Kind.HIDDEN, "", length))
            self.text = self.text[length:]

    def hide_space(self) -> None:
        self.hide(len(self.text) - len(self.text.lstrip()))

    def drain(self) -> list[Piece]:
        pieces, self.pieces = self.pieces, []
        return pieces


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` could begin, not complete, `marker`."""
    start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while start >= 0 and not marker.startswith(text[start:]):
        start = text.find(marker[0], start + 1)
    return 0 if start < 0 else len(text) - start
