"""Which tokens the pieces of a completion came from."""

from collections import deque
from dataclasses import dataclass, replace

from mlx_server.schemas.internal import TokenLogprob
from mlx_server.services.output.pieces import Kind, Piece
from mlx_server.services.output.text import CutText


@dataclass(slots=True)
class _Token:
    start: int
    end: int
    entry: TokenLogprob | None
    thought: bool = False


class TokenShares:
    """Follows the tokens of a completion through its pieces, which tell what each was good for.

    A token that has a share in the answer's text passes its entry on to `text`, with the first
    character of that; `thinking` counts the tokens that have one in thinking.
    """

    def __init__(self, text: CutText) -> None:
        self.thinking = 0
        self._text = text
        self._tokens: deque[_Token] = deque()
        self._read = 0
        self._said = 0
        self._last = Kind.TEXT

    def expect(self, start: int, end: int, entry: TokenLogprob | None) -> None:
        """Take the next token, which is characters `start` to `end` of the completion.

        One without characters goes with what follows it.
        """
        self._tokens.append(_Token(start, end, entry))

    def take(self, piece: Piece) -> None:
        """Take the next piece, before its text goes to `text`."""
        if piece.width:
            self._share_out(piece.kind, piece.width)
        if piece.kind is Kind.TEXT:
            self._said += piece.width

    def finish(self) -> None:
        """Take the completion's end: what is left goes with the last piece."""
        self._share_out(self._last, 1)

    def _share_out(self, kind: Kind, width: int) -> None:
        begin, end = self._read, self._read + width
        self._read, self._last = end, kind
        while self._tokens and self._tokens[0].start < end:
            token = self._tokens[0]
            if kind is Kind.THINKING and not token.thought:
                token.thought = True
                self.thinking += 1
            elif kind is Kind.TEXT and token.entry is not None:
                offset = self._said + max(token.start - begin, 0)
                until = self._said + min(token.end, end) - begin
                self._text.expect(until, replace(token.entry, offset=offset))
                token.entry = None
            if token.end > end:
                return
            self._tokens.popleft()
