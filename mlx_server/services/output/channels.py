"""Reads a streamed answer of messages in channels (`models.text.channels`)."""

import re
from typing import Any

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.channels import ANALYSIS, COMMENTARY, FINAL, FUNCTIONS, Mark
from mlx_server.models.text.syntax import Thinking
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.channel_calls import ChannelCall
from mlx_server.services.output.pieces import Kind, Piece, PieceBuffer

MAX_HEADER = 400
"""Characters, beyond which the message has begun without its mark."""
GAP = "\n\n"
"""Between messages of a kind."""

ANY_MARK = "".join(Mark)
SPLIT = re.compile(f"([{ANY_MARK}])")
ROLE = re.compile(r"\s*assistant\b")
RECIPIENT = re.compile(rf"(?:\bto=|\b(?={re.escape(FUNCTIONS)}))([^\s{ANY_MARK}]+)")
CHANNEL = re.compile(rf"{Mark.CHANNEL}\s*(\w+)")
HEADER = re.compile(
    rf"(?:\s*assistant\b)?(?:\s*to=[^\s{ANY_MARK}]*)?"
    rf"(?:\s*(?:{CHANNEL.pattern}(?:\s*{RECIPIENT.pattern})?(?:\s*(?:json|code)\b)?"
    rf"|{Mark.CONSTRAIN}\s*\w*))*\s*"
)
"""A role, recipients, channels and formats: what comes after that is no header."""
NOBODY = ("assistant", "all", "user")
"""Recipients of messages that are no calls."""
KINDS = {ANALYSIS: Kind.REASONING, COMMENTARY: Kind.TEXT, FINAL: Kind.TEXT, "": Kind.TEXT}
"""By channel."""


class ChannelReader:
    """Reads an answer in pieces cut anywhere. Analysis is reasoning; final, and commentary to
    nobody, is text. A message to a tool of `use` is a call in any channel; one to another tool is
    reasoning. Messages without marks are read as far as they can be. `opening`: whether a prompt
    ends within analysis (OPEN), within the answer (DONE), or before a header.
    """

    unparsed: None = None
    """Calls need no parser."""

    def __init__(self, use: ToolUse | None, opening: Thinking) -> None:
        self.done = False
        """All allowed calls have come, the answer has ended, or another speaks."""
        tools = [] if use is None else use.tools
        self._tools: dict[str, dict[str, Any]] = {
            tool["function"]["name"]: tool["function"] for tool in tools
        }
        self._max_calls = None if use is None or use.parallel else 1
        self._calls = 0
        self._buffer = PieceBuffer()
        """The header so far, or what a call's arguments hold back."""
        self._body: Kind | ChannelCall | None = None
        """None within a header."""
        if opening is not Thinking.POSSIBLE:
            self._body = Kind.REASONING if opening is Thinking.OPEN else Kind.TEXT
        self._needs_role = False
        self._is_last = False
        self._said: set[Kind] = set()
        self._gap = ""

    def push(self, text: str) -> list[Piece]:
        for part in SPLIT.split(text):
            if self.done:
                break
            if part and part in ANY_MARK:
                self._take_mark(Mark(part))
            elif part:
                self._take_text(part)
        return self._buffer.drain()

    def finish(self, reason: FinishReason) -> list[Piece]:
        if self._body is not None:
            self._close(complete=reason == "stop")
        elif reason == "stop":
            self._end_unmarked()
        else:  # half a name may be another's
            self._buffer.hide(len(self._buffer.text))
        return self._buffer.drain()

    def _take_text(self, text: str) -> None:
        if self._body is None:
            room = MAX_HEADER - len(self._buffer.text)
            self._buffer.text += text[:room]
            if len(text) <= room and self._may_be_header():
                return
            self._open_unmarked()
            text = text[room:]
        if text and not self.done:
            self._say(text)

    def _take_mark(self, mark: Mark) -> None:
        if self._body is None:
            self._take_header_mark(mark)
        elif mark in (Mark.MESSAGE, Mark.CONSTRAIN):
            self._buffer.pieces.append(Piece(Kind.HIDDEN, "", 1))
        else:
            self._close(complete=True)
            self.done = self.done or (self._is_last and mark is Mark.END)
            self._begin_header(mark)

    def _take_header_mark(self, mark: Mark) -> None:
        if mark in (Mark.CHANNEL, Mark.CONSTRAIN):
            self._buffer.text += mark
        elif mark is Mark.MESSAGE:
            header = self._buffer.text
            self._buffer.hide(len(header))
            self._open(header)
            self._buffer.pieces.append(Piece(Kind.HIDDEN, "", 1))
        else:
            self._end_unmarked()
            self._begin_header(mark)

    def _begin_header(self, mark: Mark) -> None:
        self._body = None
        self._needs_role = mark is Mark.START
        if mark is Mark.CHANNEL:
            self._buffer.text = str(mark)
        else:
            self._buffer.pieces.append(Piece(Kind.HIDDEN, "", 1))

    def _may_be_header(self) -> bool:
        text = self._buffer.text.lstrip()
        if self._needs_role or SPLIT.search(text):
            return True
        begun = any(word.startswith(text) for word in ("assistant", "to="))
        return begun or text.startswith("to=") or ROLE.match(text) is not None

    def _open_unmarked(self) -> None:
        """Begin the message of a header that lacks its end: what cannot be header is text."""
        buffer = self._buffer
        match = HEADER.match(buffer.text)
        assert match is not None
        header, text = match[0], SPLIT.sub("", buffer.text[match.end() :])
        buffer.hide(len(buffer.text) - len(text))
        buffer.text = ""
        self._open(header)
        if text and not self.done:
            self._say(text)

    def _end_unmarked(self) -> None:
        self._open_unmarked()
        self._close(complete=True)

    def _open(self, header: str) -> None:
        if self._needs_role and not ROLE.match(header):
            self.done = True
            return
        channel = next(reversed(CHANNEL.findall(header)), "")
        recipients = [one for one in RECIPIENT.findall(header) if one not in NOBODY]
        recipient = recipients[-1].removeprefix(FUNCTIONS) if recipients else ""
        self._is_last = channel == FINAL and not recipient
        if recipient in self._tools:
            self._body = ChannelCall(self._buffer, self._tools[recipient])
            return
        self._body = Kind.REASONING if recipient else KINDS.get(channel, Kind.REASONING)
        self._gap = GAP if self._body in self._said else ""

    def _say(self, text: str) -> None:
        body, pieces = self._body, self._buffer.pieces
        if isinstance(body, ChannelCall):
            body.read(text)
        elif body is not None:
            if self._gap:
                pieces.append(Piece(body, self._gap, 0))
            pieces.append(Piece(body, text, len(text)))
            self._said.add(body)
            self._gap = ""

    def _close(self, *, complete: bool) -> None:
        if isinstance(self._body, ChannelCall):
            self._body.finish(complete)
            self._calls += 1
            self.done = self._calls == self._max_calls
