"""Reads a streamed block of tool calls."""

import re
from collections.abc import Sequence

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.syntax import CallSyntax
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.block_scan import BlockScan
from mlx_server.services.output.json_scan import ObjectScan, find_header, match_length
from mlx_server.services.output.openings import Opening
from mlx_server.services.output.pieces import Kind, Piece, PieceBuffer

MAX_HEADER = 1000
"""Characters before arguments, and between calls."""

SEPARATORS = re.compile(r"[\s,;\]]*")
WORD = re.compile(r"[\w-]+")
PYTHON_CALL = re.compile(r"\[\s*([\w.-]*)")
LIST_END = re.compile(r"\s*\]?\s*")
EXTRA_KEY = re.compile(r',\s{0,99}"')
EXTRA_KEY_BEGUN = re.compile(r",\s{0,99}")


class CallReader:
    """Reads from after the start marker through the end marker. JSON calls stream; others are
    collected and stay `unparsed` until `parsed` is called. Garbled text is returned verbatim, but a
    call whose arguments have begun stays a call. `opening` is the start marker, if any, with
    preceding white space.
    """

    def __init__(
        self,
        buffer: PieceBuffer,
        syntax: CallSyntax,
        use: ToolUse,
        opening: str,
        kind: Opening = Opening.MARKER,
    ) -> None:
        self.ended = False
        self.calls = 0
        self.unparsed: str | None = None
        self._buffer = buffer
        self._syntax = syntax
        self._names = {tool["function"]["name"] for tool in use.tools}
        self._max_calls = None if use.parallel else 1
        self._opening = opening
        self._collected: list[str] = []
        self._closing = ""
        self._scan = ObjectScan(syntax.end)
        self._block_scan = BlockScan(syntax)
        self._kind = kind
        self._state = self._read_header
        if kind is Opening.BARE or (kind is Opening.MARKER and not syntax.json):
            self._state = self._collect
        elif kind is Opening.SHAPE and syntax.pythonic:
            self._state = self._read_shape

    def read(self) -> None:
        while not self.ended and self.unparsed is None and self._state():
            pass

    def finish(self, reason: FinishReason) -> None:
        buffer = self._buffer
        if self._state in (self._read_shape, self._read_header, self._collect):
            unlike = self._kind is Opening.SHAPE and self._state != self._collect
            self._collected.append(buffer.text)
            buffer.text = ""
            if reason == "stop" and (self._syntax.anywhere or not unlike):
                self.unparsed = "".join(self._collected)
            else:  # half a call may look whole
                self._give_back()
        elif self._state == self._read_arguments:
            buffer.cut(Kind.ARGUMENTS, len(buffer.text))
        elif self._state == self._read_extra_keys:
            buffer.hide(len(buffer.text))
        else:
            buffer.hide(match_length(LIST_END, buffer.text))
            if self._syntax.end.startswith(buffer.text):
                buffer.hide(len(buffer.text))
            buffer.cut(Kind.TEXT, len(buffer.text))

    def parsed(self, calls: Sequence[tuple[str, str]]) -> None:
        self.unparsed = None
        if not calls or any(name not in self._names for name, _ in calls):
            self._give_back()
            return
        pieces = self._buffer.pieces
        pieces.append(Piece(Kind.HIDDEN, "", len(self._block)))
        for name, arguments in calls[: self._max_calls]:
            pieces += Piece(Kind.CALL, name, 0), Piece(Kind.ARGUMENTS, arguments, 0)
            self.calls += 1
        self.ended = True

    # States; each returns whether the next can read at once.

    def _read_shape(self) -> bool:
        """`[name(`, or else JSON."""
        text = self._buffer.text
        match = PYTHON_CALL.match(text)
        if match is not None and match.end() == len(text) and self._may_be_name(match[1]):
            return False
        called = match is not None and match[1] in self._names and text[match.end()] == "("
        self._state = self._collect if called else self._read_header
        return True

    def _read_header(self) -> bool:
        buffer = self._buffer
        try:
            found = find_header(buffer.text)
        except ValueError:
            return self._read_unexpected()
        if found is None and len(buffer.text) <= MAX_HEADER:
            return False
        if found is None or found[1] > MAX_HEADER or found[0] not in self._names:
            return self._read_unexpected()
        name, length = found
        buffer.pieces += (
            Piece(Kind.HIDDEN, "", len(self._opening) + length),
            Piece(Kind.CALL, name, 0),
        )
        buffer.text = buffer.text[length:]
        self._state = self._read_arguments
        return True

    def _read_unexpected(self) -> bool:
        """After a marker, other JSON may be a call, or Python with a tool's name; the rest is
        text.
        """
        buffer = self._buffer
        if self._opening.strip():
            text = buffer.text.lstrip()
            word = WORD.match(text)
            if word is not None and word.end() == len(text) and self._may_be_name(text):
                return False
            if text.startswith(("{", "[")) or (word and word[0] in self._names):
                self._state = self._collect
                return True
        # Another block may begin after the marker or a bare call's first character.
        buffer.text = self._opening + buffer.text
        buffer.cut(Kind.TEXT, len(self._opening) or 1)
        self.ended = True
        return False

    def _may_be_name(self, text: str) -> bool:
        return any(name.startswith(text) for name in self._names)

    def _read_arguments(self) -> bool:
        length, complete = self._scan.push(self._buffer.text)
        self._buffer.cut(Kind.ARGUMENTS, length)
        if not complete:
            return False
        self.calls += 1
        self.ended = self.calls == self._max_calls
        self._state = self._read_call_end
        return True

    def _read_call_end(self) -> bool:
        buffer = self._buffer
        buffer.hide_space()
        if not buffer.text or EXTRA_KEY_BEGUN.fullmatch(buffer.text):
            return False
        if EXTRA_KEY.match(buffer.text):
            self._scan = ObjectScan(self._syntax.end, depth=1)
            self._state = self._read_extra_keys
            return True
        buffer.hide(int(buffer.text[0] == "}"))
        self._state = self._read_separators
        return True

    def _read_extra_keys(self) -> bool:
        length, complete = self._scan.push(self._buffer.text)
        self._buffer.hide(length)
        if complete:
            self._state = self._read_separators
        return complete

    def _read_separators(self) -> bool:
        buffer = self._buffer
        buffer.hide_space()
        text, end_marker = buffer.text, self._syntax.end
        length = match_length(SEPARATORS, text)
        if length <= MAX_HEADER:
            if end_marker and text.startswith(end_marker, length):
                buffer.hide(length + len(end_marker))
                self.ended = True
                return False
            if text.startswith("{", length):
                self._opening, buffer.text = text[:length], text[length:]
                self._scan = ObjectScan(end_marker)
                self._state = self._read_header
                return True
            if end_marker.startswith(text[length:]):
                return False
        buffer.hide(match_length(LIST_END, text))
        self.ended = True
        return False

    def _collect(self) -> bool:
        buffer, end_marker = self._buffer, self._syntax.end
        certain, ended = self._block_scan.push(buffer.text)
        if certain:
            self._collected.append(buffer.text[:certain])
            buffer.text = buffer.text[certain:]
        if ended:
            self._closing = end_marker
            buffer.text = buffer.text[len(end_marker) :]
            self.unparsed = "".join(self._collected)
        return False

    @property
    def _block(self) -> str:
        return self._opening + "".join(self._collected) + self._closing

    def _give_back(self) -> None:
        block = self._block
        self._buffer.pieces.append(Piece(Kind.TEXT, block, len(block)))
        self.ended = True
