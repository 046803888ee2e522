"""What a completion is made of, once it has been read."""

from enum import Enum, auto
from typing import NamedTuple


class Kind(Enum):
    """What a piece of a completion is."""

    TEXT = auto()
    """Of the answer."""
    THINKING = auto()
    CALL = auto()
    """The name of a tool that is called. What it is called with follows."""
    ARGUMENTS = auto()
    HIDDEN = auto()
    """Nothing that anybody is shown: a marker, or white space beside one."""


class Piece(NamedTuple):
    """A piece of a completion, and how many characters of it were read for that.

    The widths of a completion's pieces add up to its length.
    """

    kind: Kind
    text: str
    width: int


def said(text: str) -> Piece:
    """Text of the answer, as it stands in the completion."""
    return Piece(Kind.TEXT, text, len(text))


def thought(text: str) -> Piece:
    """Thinking, as it stands in the completion."""
    return Piece(Kind.THINKING, text, len(text))


def hidden(width: int) -> Piece:
    """So many characters that nobody is shown."""
    return Piece(Kind.HIDDEN, "", width)


def called(name: str) -> Piece:
    """The beginning of a call."""
    return Piece(Kind.CALL, name, 0)
