"""Splits a completion into reasoning, text and tool calls as it streams."""

from collections.abc import Sequence

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.syntax import Syntax
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.pieces import Kind, Piece, PieceBuffer, overlap
from mlx_server.services.output.reasoning import ReasoningReader
from mlx_server.services.output.tool_calls import CallReader

MAX_SPACE = 200
"""Characters held back before a possible marker."""


class OutputReader:
    """Reads a completion in pieces cut anywhere. Reasoning is a block before the answer or right
    after a tool call; elsewhere its markers are text. Calls are read if `use` allows them. White
    space around blocks is dropped. `thinking`: begins inside a reasoning block.
    """

    def __init__(self, syntax: Syntax, use: ToolUse | None, *, thinking: bool) -> None:
        self.done = False
        """All allowed calls have come."""
        self._reasoning = syntax.reasoning
        self._call_syntax = None if use is None else syntax.calls
        self._use = use
        self._buffer = PieceBuffer()
        self._block: ReasoningReader | CallReader | None = None
        if thinking:
            assert syntax.reasoning is not None
            self._block = ReasoningReader(self._buffer, syntax.reasoning.end)
        self._at_start = True
        self._skips_space = False

    @property
    def unparsed(self) -> str | None:
        """Tool calls to parse: call `parsed` next."""
        return self._block.unparsed if isinstance(self._block, CallReader) else None

    def push(self, text: str) -> list[Piece]:
        self._buffer.text += text
        return self._read()

    def parsed(self, calls: Sequence[tuple[str, str]]) -> list[Piece]:
        """Take the (name, arguments) in `unparsed`; none if garbled."""
        assert isinstance(self._block, CallReader)
        self._block.parsed(calls)
        return self._read()

    def finish(self, reason: FinishReason) -> list[Piece]:
        """Afterwards something may be `unparsed`."""
        match self._block:
            case CallReader() as calls:
                calls.finish(reason)
            case ReasoningReader() as reasoning:
                reasoning.finish()
            case _:
                self._buffer.cut(Kind.TEXT, len(self._buffer.text))
        return self._buffer.drain()

    def _read(self) -> list[Piece]:
        while not self.done and self._step():
            pass
        return self._buffer.drain()

    def _step(self) -> bool:
        if self._block is not None:
            return self._read_block(self._block)
        if self._skips_space:
            self._buffer.hide_space()
            self._skips_space = not self._buffer.text
        if not self._buffer.text:
            return False
        return self._read_start() if self._at_start else self._read_text()

    def _read_block(self, block: ReasoningReader | CallReader) -> bool:
        block.read()
        if isinstance(block, CallReader):
            self.done = block.calls > 0 and self._use is not None and not self._use.parallel
        if not block.ended:
            return False
        self._block = None
        pieces = self._buffer.pieces
        garbled = bool(pieces) and pieces[-1].kind is Kind.TEXT
        self._at_start = self._skips_space = not garbled
        return True

    def _read_start(self) -> bool:
        text = self._buffer.text.lstrip()
        space = len(self._buffer.text) - len(text)
        if space <= MAX_SPACE:
            if self._reasoning is not None and text.startswith(self._reasoning.start):
                self._buffer.hide(space + len(self._reasoning.start))
                self._block = ReasoningReader(self._buffer, self._reasoning.end)
                return True
            markers = [part.start for part in (self._reasoning, self._call_syntax) if part]
            if any(marker != text and marker.startswith(text) for marker in markers):
                return False
            if self._is_bare_call(text):
                return self._open_calls(space)
        self._at_start = False
        return True

    def _is_bare_call(self, text: str) -> bool:
        """JSON calls that last to the end often lack the start marker."""
        syntax = self._call_syntax
        if syntax is None or syntax.end or not syntax.json:
            return False
        return text[0] in "{[" and not text.startswith(syntax.start)

    def _read_text(self) -> bool:
        buffer, text = self._buffer, self._buffer.text
        if self._call_syntax is None:
            buffer.cut(Kind.TEXT, len(text))
            return False
        marker = self._call_syntax.start
        found = text.find(marker)
        end = found if found >= 0 else len(text) - overlap(text, marker)
        space = min(end - len(text[:end].rstrip()), MAX_SPACE)
        buffer.cut(Kind.TEXT, end - space)
        return found >= 0 and self._open_calls(space + len(marker))

    def _open_calls(self, length: int) -> bool:
        assert self._call_syntax is not None
        assert self._use is not None
        buffer = self._buffer
        opening, buffer.text = buffer.text[:length], buffer.text[length:]
        self._block = CallReader(buffer, self._call_syntax, self._use, opening)
        return True
