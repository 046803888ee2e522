"""Tells thinking, text and tool calls apart in a completion, as it comes."""

from collections.abc import Sequence

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.adapters.base import CallSyntax, Reasoning, Syntax
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.pieces import Kind, Piece, hidden, said, thought
from mlx_server.services.output.tool_calls import CallReader

MOST_SPACE = 200
"""Characters of white space that are held back in case a marker follows and they are dropped."""


class OutputReader:
    """Reads one completion, cut into pieces in any way.

    Thinking is what stands in a block before the answer, or right after a tool call; the same
    markers in the midst of a text are text. A block that never ends is thinking to the end. White
    space after its markers is dropped, and so is white space around tool calls. `thinking` says
    that the completion begins inside a block.

    Calls are looked for where `use` says that there may be some; see `CallReader`. Where they are
    JSON to the end of the answer, models leave the marker out if there is nothing before it. While
    a block is `unparsed`, `parsed` must be called before anything else.
    """

    def __init__(self, syntax: Syntax, use: ToolUse | None, *, thinking: bool) -> None:
        self.done = False
        """Whether as many calls have come as may be; nothing follows then."""
        self._reasoning = syntax.reasoning
        self._syntax = None if use is None else syntax.calls
        self._use = use
        self._calls: CallReader | None = None
        self._thinking = thinking
        self._at_start = True
        self._skips_space = thinking
        self._held = ""
        self._pieces: list[Piece] = []

    @property
    def unparsed(self) -> str | None:
        """A block of tool calls that has to be parsed before more can be read."""
        return None if self._calls is None else self._calls.unparsed

    def push(self, text: str) -> list[Piece]:
        """Take more text. Returns what it makes certain."""
        self._held += text
        return self._read()

    def parsed(self, calls: Sequence[tuple[str, str]]) -> list[Piece]:
        """Go on after `unparsed` has been found to hold `calls`, names and arguments."""
        assert self._calls is not None
        self._pieces += self._calls.parsed(calls)
        return self._read()

    def finish(self, reason: FinishReason) -> list[Piece]:
        """Take the completion's end. Returns what is certain then, except what is `unparsed`."""
        if self._calls is not None:
            return self._calls.finish(reason)
        held, self._held = self._held, ""
        if not held:
            return []
        return [thought(held) if self._thinking else said(held)]

    def _read(self) -> list[Piece]:
        while not self.done and self._goes_on():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _goes_on(self) -> bool:
        """Read on; whether something else begins that can be read now."""
        if self._calls is not None:
            return self._read_calls(self._calls)
        if self._skips_space:
            self._hide(len(self._held) - len(self._held.lstrip()))
            self._skips_space = not self._held
        if not self._held:
            return False
        if self._thinking:
            assert self._reasoning is not None
            return self._read_thinking(self._reasoning)
        if self._at_start and (found := self._look_for_start()) is not None:
            return found
        return self._read_text()

    def _read_thinking(self, markers: Reasoning) -> bool:
        found = self._held.find(markers.end)
        if found < 0:
            self._tell(Kind.THINKING, len(self._held) - overlap(self._held, markers.end))
            return False
        self._tell(Kind.THINKING, found)
        self._hide(len(markers.end))
        self._thinking = False
        self._at_start = self._skips_space = True
        return True

    def _look_for_start(self) -> bool | None:
        """Look for what begins in front of any text only; None when it is not there.

        False while there is too little to tell.
        """
        rest = self._held.lstrip()
        space = len(self._held) - len(rest)
        if space <= MOST_SPACE:
            if self._reasoning and rest.startswith(self._reasoning.start):
                self._hide(space + len(self._reasoning.start))
                self._thinking = self._skips_space = True
                return True
            markers = [part.start for part in (self._reasoning, self._syntax) if part]
            if any(marker != rest and marker.startswith(rest) for marker in markers):
                return False
            if self._syntax and self._is_bare_call(self._syntax, rest):
                return self._open_calls(self._syntax, space)
        self._at_start = False
        return None

    @staticmethod
    def _is_bare_call(syntax: CallSyntax, text: str) -> bool:
        """Whether `text` may begin a call without a marker."""
        ends_with_answer = syntax.json and not syntax.end
        return ends_with_answer and text[0] in "{[" and not text.startswith(syntax.start)

    def _read_text(self) -> bool:
        if self._syntax is None:
            self._tell(Kind.TEXT, len(self._held))
            return False
        marker = self._syntax.start
        found = self._held.find(marker)
        end = found if found >= 0 else len(self._held) - overlap(self._held, marker)
        space = min(end - len(self._held[:end].rstrip()), MOST_SPACE)
        self._tell(Kind.TEXT, end - space)
        return found >= 0 and self._open_calls(self._syntax, space + len(marker))

    def _open_calls(self, syntax: CallSyntax, length: int) -> bool:
        """Begin a block of calls behind the first `length` characters that are held."""
        assert self._use is not None
        self._calls = CallReader(syntax, self._use, self._held[:length])
        self._held = self._held[length:]
        return True

    def _read_calls(self, calls: CallReader) -> bool:
        if calls.rest is None:
            self._pieces += calls.push(self._held)
            self._held = ""
        self.done = calls.calls > 0 and self._use is not None and not self._use.parallel
        if calls.rest is None:
            return False
        self._calls, self._held = None, calls.rest
        garbled = bool(self._pieces) and self._pieces[-1].kind is Kind.TEXT
        self._at_start = self._skips_space = not garbled
        return True

    def _tell(self, kind: Kind, length: int) -> None:
        """Make a piece of the first `length` characters that are held."""
        if length:
            self._pieces.append(Piece(kind, self._held[:length], length))
            self._held = self._held[length:]

    def _hide(self, length: int) -> None:
        if length:
            self._pieces.append(hidden(length))
            self._held = self._held[length:]


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` could begin `marker`, without being all of it."""
    start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while start >= 0 and not marker.startswith(text[start:]):
        start = text.find(marker[0], start + 1)
    return 0 if start < 0 else len(text) - start
