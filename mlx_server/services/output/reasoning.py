"""Reads a streamed block of reasoning."""

from mlx_server.services.output.pieces import Kind, PieceBuffer, overlap


class ReasoningReader:
    """Reads from after the start marker through the end marker, if it comes; drops leading white
    space.
    """

    def __init__(self, buffer: PieceBuffer, end_marker: str) -> None:
        self.ended = False
        self._buffer = buffer
        self._end_marker = end_marker
        self._at_start = True

    def read(self) -> None:
        buffer, marker = self._buffer, self._end_marker
        if self._at_start:
            buffer.hide_space()
            self._at_start = not buffer.text
        text = buffer.text
        found = text.find(marker)
        if found < 0:
            buffer.cut(Kind.REASONING, len(text) - overlap(text, marker))
            return
        buffer.cut(Kind.REASONING, found)
        buffer.hide(len(marker))
        self.ended = True

    def finish(self) -> None:
        self._buffer.cut(Kind.REASONING, len(self._buffer.text))
