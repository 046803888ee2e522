"""Which tokens a completion's pieces came from."""

from collections import deque
from dataclasses import dataclass, replace

from mlx_server.schemas.internal import TokenLogprob
from mlx_server.services.output.pieces import Kind, Piece
from mlx_server.services.output.text import TruncatedText


@dataclass(slots=True)
class _Token:
    start: int
    end: int
    entry: TokenLogprob | None
    counted: bool = False


class TokenAligner:
    """Matches tokens to pieces by character position. Passes the answer's entries to `text`, and
    counts reasoning tokens.
    """

    def __init__(self, text: TruncatedText) -> None:
        self.reasoning_tokens = 0
        self._text = text
        self._tokens: deque[_Token] = deque()
        self._position = 0
        self._text_length = 0
        self._last_kind = Kind.TEXT

    def add_token(self, start: int, end: int, entry: TokenLogprob | None) -> None:
        """A token without characters belongs to what follows it."""
        self._tokens.append(_Token(start, end, entry))

    def add_piece(self, piece: Piece) -> None:
        """Call before adding the piece to `text`."""
        if piece.width:
            self._pass(piece.kind, piece.width)
        if piece.kind is Kind.TEXT:
            self._text_length += len(piece.text)

    def finish(self) -> None:
        self._pass(self._last_kind, 1)

    def _pass(self, kind: Kind, width: int) -> None:
        begin, end = self._position, self._position + width
        self._position, self._last_kind = end, kind
        while self._tokens and self._tokens[0].start < end:
            token = self._tokens[0]
            if kind is Kind.REASONING and not token.counted:
                token.counted = True
                self.reasoning_tokens += 1
            elif kind is Kind.TEXT and token.entry is not None:
                offset = self._text_length + max(token.start - begin, 0)
                entry_end = self._text_length + min(token.end, end) - begin
                self._text.add_entry(entry_end, replace(token.entry, offset=offset))
                token.entry = None
            if token.end > end:
                break
            self._tokens.popleft()
