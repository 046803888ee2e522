"""One choice: engine rows in, events out."""

import logging
import secrets
import string
from collections.abc import Mapping, Sequence
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
from mlx_server.services.output.alignment import TokenAligner
from mlx_server.services.output.channels import ChannelReader
from mlx_server.services.output.completion import OutputReader
from mlx_server.services.output.pieces import Kind, Piece
from mlx_server.services.output.repeats import RepeatFilter
from mlx_server.services.output.text import (
    AlignedText,
    TokenDecoder,
    TruncatedText,
    Vocabulary,
    token_logprob,
)

ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 24

log = logging.getLogger("mlx_server.services")


class Guesses:
    """How many guessed tokens of a choice came true, and how many did not."""

    def __init__(self) -> None:
        self.accepted = self.rejected = 0

    def count(self, row: Row) -> None:
        self.accepted += row.accepted
        self.rejected += row.guessed - row.accepted


class PlainChoice:
    def __init__(
        self, index: int, vocabulary: Vocabulary, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self.index = index
        self.text = AlignedText(vocabulary, stops)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.guesses = Guesses()

    def take(self, row: Row) -> list[Event]:
        events: list[Event] = []
        self.cached_tokens = row.cached or self.cached_tokens
        self.guesses.count(row)
        # A stop token is no part of the text.
        text_tokens = len(row.tokens) - (row.finish == "stop")
        for position, token in enumerate(row.tokens):
            self.completion_tokens += 1
            if position >= text_tokens:
                break
            text, entries = self.text.push(token, row.logprobs[position] if row.logprobs else None)
            if text or entries:
                events.append(TextDelta(self.index, text, entries))
            if self.text.stopped:
                events.append(self._finished("stop"))
                return events
        if row.finish is not None:
            text, entries = self.text.flush()
            if text or entries:
                events.append(TextDelta(self.index, text, entries))
            events.append(self._finished(row.finish))
        return events

    def _finished(self, reason: FinishReason) -> Finished:
        usage = Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            accepted_guesses=self.guesses.accepted,
            rejected_guesses=self.guesses.rejected,
        )
        return Finished(self.index, reason, usage, self.text.stop)


class TextSide(Vocabulary, Protocol):
    def visible_bytes(self, token: int) -> bytes: ...

    async def parse_calls(
        self, text: str, tools: list[dict[str, Any]]
    ) -> list[tuple[str, str]]: ...


class ParsedChoice:
    """May hold reasoning and tool calls. Stop strings and log-probabilities apply to the answer's
    text only.
    """

    def __init__(
        self,
        index: int,
        text_side: TextSide,
        reader: OutputReader | ChannelReader,
        use: ToolUse | None,
        stops: tuple[str, ...],
        prompt_tokens: int,
        names: Mapping[str, str],
    ) -> None:
        """`names` are tools' own, by their stand-ins."""
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.guesses = Guesses()
        self._names = names
        self._text_side = text_side
        self._vocabulary = VisibleVocabulary(text_side)
        self._reader = reader
        self._tools = [] if use is None else use.tools
        forced = use is not None and use.choice == "required"
        self._repeats = RepeatFilter() if forced else None
        self._decoder = TokenDecoder(text_side.visible_bytes)
        self._decoded = 0
        self._text = TruncatedText(stops)
        self._aligner = TokenAligner(self._text)
        self._calls = 0
        self._events: list[Event] = []

    async def take(self, row: Row) -> list[Event]:
        self.cached_tokens = row.cached or self.cached_tokens
        self.guesses.count(row)
        # A stop token is no part of the completion.
        text_tokens = len(row.tokens) - (row.finish == "stop")
        for position, token in enumerate(row.tokens):
            self.completion_tokens += 1
            if position >= text_tokens:
                break
            logprobs = row.logprobs[position] if row.logprobs else None
            entry = None if logprobs is None else token_logprob(self._vocabulary, logprobs, 0)
            self._emit(self._reader.push(self._decode(token, entry)))
            if self._reader.unparsed is not None:
                await self._emit_unparsed()
            if self._text.stopped or self._reader.done or self._repeats_itself:
                return self._finish("stop")
        if row.finish is not None:
            self._emit(self._reader.finish(row.finish))
            await self._emit_unparsed()
            return self._finish(row.finish)
        return self._drain()

    def _decode(self, token: int, entry: TokenLogprob | None) -> str:
        start = self._decoded
        text = self._decoder.push(token)
        self._decoded += len(text)
        self._aligner.add_token(start, self._decoded + self._decoder.inside_character, entry)
        return text

    async def _emit_unparsed(self) -> None:
        reader = self._reader
        if isinstance(reader, ChannelReader):
            return
        while not self._text.stopped and (block := reader.unparsed) is not None:
            self._emit(reader.parsed(await self._parse(block)))

    async def _parse(self, block: str) -> list[tuple[str, str]]:
        try:
            return await self._text_side.parse_calls(block, self._tools)
        except ServerError as error:
            # Show the block as text instead.
            log.warning(event("tool_calls_unparsed", error=error.code or type(error).__name__))
            return []

    @property
    def _repeats_itself(self) -> bool:
        return self._repeats is not None and self._repeats.repeated

    def _emit(self, pieces: Sequence[Piece]) -> None:
        self._tell(pieces if self._repeats is None else self._repeats.push(pieces))

    def _tell(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self._text.stopped:
                return
            self._aligner.add_piece(piece)
            self._emit_piece(piece)

    def _emit_piece(self, piece: Piece) -> None:
        if piece.kind is Kind.TEXT:
            self._emit_text(*self._text.add(piece.text))
            return
        self._emit_text(*self._text.flush())
        if piece.kind is Kind.REASONING:
            self._events.append(ReasoningDelta(self.index, piece.text))
        elif piece.kind is Kind.CALL:
            name = self._names.get(piece.text, piece.text)
            self._events.append(ToolCallStart(self.index, self._calls, call_id(), name))
            self._calls += 1
        elif piece.kind is Kind.ARGUMENTS:
            self._events.append(ToolCallDelta(self.index, self._calls - 1, piece.text))

    def _emit_text(self, text: str, entries: tuple[TokenLogprob, ...]) -> None:
        if text or entries:
            self._events.append(TextDelta(self.index, text, entries))

    def _finish(self, reason: FinishReason) -> list[Event]:
        if self._repeats is not None:
            self._tell(self._repeats.end_call())
        if not self._text.stopped:
            self._aligner.finish()
            self._emit_text(*self._text.flush())
        usage = Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self._aligner.reasoning_tokens,
            self.guesses.accepted,
            self.guesses.rejected,
        )
        called = self._calls > 0 and reason == "stop"
        told = "tool_calls" if called else reason
        self._events.append(Finished(self.index, told, usage, self._text.stop))
        return self._drain()

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class VisibleVocabulary:
    def __init__(self, text_side: TextSide) -> None:
        self.token_bytes = text_side.visible_bytes
        self.token_name = text_side.token_name


def call_id() -> str:
    return "call_" + "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
