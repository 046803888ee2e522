"""Splits a completion into reasoning, text and tool calls as it streams."""

from collections.abc import Sequence

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.syntax import Syntax
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.openings import Opening, Openings
from mlx_server.services.output.pieces import Kind, Piece, PieceBuffer
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
        self._openings = None if self._call_syntax is None else Openings(self._call_syntax)
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
            if not text or self._marker_may_come(text):
                return False
            found = self._openings.at_start(text) if self._openings else None
            if found is not None:
                return self._open_calls(space, *found)
        self._at_start = False
        return True

    def _marker_may_come(self, text: str) -> bool:
        start = self._reasoning.start if self._reasoning else ""
        if start != text and start.startswith(text):
            return True
        return self._openings is not None and self._openings.may_come(text)

    def _read_text(self) -> bool:
        buffer, text = self._buffer, self._buffer.text
        if self._openings is None:
            buffer.cut(Kind.TEXT, len(text))
            return False
        found = self._openings.find(text)
        end = len(text) - self._openings.held(text) if found is None else found[0]
        space = min(end - len(text[:end].rstrip()), MAX_SPACE)
        buffer.cut(Kind.TEXT, end - space)
        return found is not None and self._open_calls(space, *found[1:])

    def _open_calls(self, space: int, kind: Opening, opening: str) -> bool:
        assert self._call_syntax is not None
        assert self._use is not None
        buffer = self._buffer
        length = space + (len(opening) if kind is Opening.MARKER else 0)
        hidden, buffer.text = buffer.text[:length], buffer.text[length:]
        self._block = CallReader(buffer, self._call_syntax, self._use, hidden, kind)
        return True
