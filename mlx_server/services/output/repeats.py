"""Leaves out tool calls that repeat one of the answer: weak models that must call know no end."""

from collections.abc import Sequence

from mlx_server.services.output.pieces import Kind, Piece


class RepeatFilter:
    """Holds a call back for as long as it reads like an earlier one."""

    def __init__(self) -> None:
        self.repeated = False
        """A call was the same word for word, and nothing is told any more."""
        self._made: dict[str, list[str]] = {}
        """Arguments by name."""
        self._name = ""
        self._arguments: list[str] = []
        self._length = 0
        self._alike: list[str] = []
        self._held: list[Piece] = []

    def push(self, pieces: Sequence[Piece]) -> list[Piece]:
        told: list[Piece] = []
        for piece in pieces:
            if self._arguments and piece.kind is not Kind.ARGUMENTS:
                told += self.end_call()
            if self.repeated:
                break
            told += self._take(piece)
        return told

    def end_call(self) -> list[Piece]:
        """What was held back, unless it is a repeated call."""
        arguments = "".join(self._arguments)
        self.repeated = self.repeated or arguments in self._alike
        held = [] if self.repeated else self._held
        self._made.setdefault(self._name, []).append(arguments)
        self._arguments, self._length, self._alike, self._held = [], 0, [], []
        return held

    def _take(self, piece: Piece) -> list[Piece]:
        self._held.append(piece)
        if piece.kind is Kind.CALL:
            self._name = piece.text
            self._alike = self._made.get(piece.text, [])
        elif piece.kind is Kind.ARGUMENTS:
            self._arguments.append(piece.text)
            self._alike = [one for one in self._alike if one.startswith(piece.text, self._length)]
            self._length += len(piece.text)
        if self._alike:
            return []
        held, self._held = self._held, []
        return held
