"""One choice's way from an engine's rows to events: as plain text, or read for more than that."""

import logging
import secrets
import string
from collections.abc import Sequence
from typing import Any, Protocol

from mlx_server.engine.protocol import FinishReason, Row
from mlx_server.errors import ServerError
from mlx_server.events import event
from mlx_server.schemas.internal import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    ToolUse,
    Usage,
)
from mlx_server.services.output.completion import OutputReader
from mlx_server.services.output.pieces import Kind, Piece
from mlx_server.services.output.shares import TokenShares
from mlx_server.services.output.text import (
    AlignedText,
    CutText,
    TokenDecoder,
    TokenTexts,
    token_logprob,
)

ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 24

log = logging.getLogger("mlx_server.services")


class PlainChoice:
    """A choice of which all is text."""

    def __init__(
        self, index: int, texts: TokenTexts, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self.index = index
        self.text = AlignedText(texts, stops)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0

    def take(self, row: Row) -> list[Event]:
        """The events that `row` brings about; none follow a `Finished`, which is the last."""
        events: list[Event] = []
        self.cached_tokens = row.cached or self.cached_tokens
        # A stop token ends the text and is no part of it.
        spoken = len(row.tokens) - (row.finish == "stop")
        for position, token in enumerate(row.tokens):
            self.completion_tokens += 1
            if position >= spoken:
                break
            text, entries = self.text.push(token, row.logprobs[position] if row.logprobs else None)
            if text or entries:
                events.append(TextDelta(self.index, text, entries))
            if self.text.stopped:
                events.append(self._finished("stop"))
                return events
        if row.finish is not None:
            text, entries = self.text.finish()
            if text or entries:
                events.append(TextDelta(self.index, text, entries))
            events.append(self._finished(row.finish))
        return events

    def _finished(self, reason: FinishReason) -> Finished:
        usage = Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
        return Finished(self.index, reason, usage)


class OutputTexts(TokenTexts, Protocol):
    """What is known of a model's text where more than plain text is looked for."""

    def visible_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token in running text, or of the marker that it is."""

    async def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Names and arguments of the tool calls in `text`, none if it is garbled."""


class ReadChoice:
    """A choice that is read for thinking and tool calls.

    Stop strings are looked for in the answer's text only, and only its log-probabilities are told.
    """

    def __init__(
        self,
        index: int,
        texts: OutputTexts,
        reader: OutputReader,
        use: ToolUse | None,
        stops: tuple[str, ...],
        prompt_tokens: int,
    ) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._texts = texts
        self._visible = VisibleTexts(texts)
        self._reader = reader
        self._tools = [] if use is None else use.tools
        self._decoder = TokenDecoder(texts.visible_bytes)
        self._decoded = 0
        self._text = CutText(stops)
        self._shares = TokenShares(self._text)
        self._calls = 0
        self._events: list[Event] = []

    async def take(self, row: Row) -> list[Event]:
        """The events that `row` brings about; none follow a `Finished`, which is the last."""
        self.cached_tokens = row.cached or self.cached_tokens
        # A stop token ends the completion and is no part of it.
        spoken = len(row.tokens) - (row.finish == "stop")
        for position, token in enumerate(row.tokens):
            self.completion_tokens += 1
            if position >= spoken:
                break
            logprobs = row.logprobs[position] if row.logprobs else None
            entry = None if logprobs is None else token_logprob(self._visible, logprobs, 0)
            await self._say(self._reader.push(self._decoded_text(token, entry)))
            if self._text.stopped or self._reader.done:
                return self._finished("stop")
        if row.finish is not None:
            await self._say(self._reader.finish(row.finish))
            return self._finished(row.finish)
        return self._new_events()

    def _decoded_text(self, token: int, entry: TokenLogprob | None) -> str:
        start = self._decoded
        text = self._decoder.push(token)
        self._decoded += len(text)
        self._shares.expect(start, self._decoded + self._decoder.inside_character, entry)
        return text

    async def _say(self, pieces: Sequence[Piece]) -> None:
        """Make events of `pieces`, and of what has to be parsed first."""
        for piece in pieces:
            self._say_piece(piece)
        while not self._text.stopped and (block := self._reader.unparsed) is not None:
            for piece in self._reader.parsed(await self._parse(block)):
                self._say_piece(piece)

    async def _parse(self, block: str) -> list[tuple[str, str]]:
        try:
            return await self._texts.parse_calls(block, self._tools)
        except ServerError as error:
            # The answer is there all the same.
            log.warning(event("tool_calls_unparsed", error=error.code or type(error).__name__))
            return []

    def _say_piece(self, piece: Piece) -> None:
        if self._text.stopped:
            return
        self._shares.take(piece)
        if piece.kind is Kind.TEXT:
            self._say_text(*self._text.add(piece.text))
            return
        self._say_text(*self._text.finish())
        if piece.kind is Kind.THINKING:
            self._events.append(ReasoningDelta(self.index, piece.text))
        elif piece.kind is Kind.CALL:
            self._events.append(ToolCallStart(self.index, self._calls, call_id(), piece.text))
            self._calls += 1
        elif piece.kind is Kind.ARGUMENTS:
            self._events.append(ToolCallDelta(self.index, self._calls - 1, piece.text))

    def _say_text(self, text: str, entries: tuple[TokenLogprob, ...]) -> None:
        if text or entries:
            self._events.append(TextDelta(self.index, text, entries))

    def _finished(self, reason: FinishReason) -> list[Event]:
        if not self._text.stopped:
            self._shares.finish()
            self._say_text(*self._text.finish())
        usage = Usage(
            self.prompt_tokens, self.completion_tokens, self.cached_tokens, self._shares.thinking
        )
        called = self._calls > 0 and reason == "stop"
        self._events.append(Finished(self.index, "tool_calls" if called else reason, usage))
        return self._new_events()

    def _new_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class VisibleTexts:
    """A model's tokens, markers among them shown as text."""

    def __init__(self, texts: OutputTexts) -> None:
        self.token_bytes = texts.visible_bytes
        self.token_name = texts.token_name


def call_id() -> str:
    """A fresh id for a tool call."""
    return "call_" + "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
