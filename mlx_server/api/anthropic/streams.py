"""Answers as events."""

from collections.abc import Sequence
from typing import Literal

from mlx_server.api.anthropic.answering import NO_EDITS, Answering, Kind, call_id
from mlx_server.api.anthropic.usage import delta_usage, stop_reason
from mlx_server.api.anthropic.wire import PING
from mlx_server.api.chunk_template import ChunkTemplate
from mlx_server.api.http.wire import StreamEvent
from mlx_server.schemas.anthropic.responses import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    BlockDelta,
    BlockStart,
    BlockStop,
    Delta,
    EventBody,
    InputDelta,
    MessageDelta,
    MessageStart,
    MessageStop,
    SignatureDelta,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from mlx_server.schemas.internal import (
    Event,
    Finished,
    PromptScored,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.schemas.internal import TextDelta as Text


class MessageStream:
    """One block is open at a time."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._open: Kind | None = None
        self._index = -1
        self._thoughts: list[str] = []
        self._finished: Finished | None = None
        self._text: ChunkTemplate[int] = ChunkTemplate(
            lambda index, text: _delta(index, TextDelta(type="text_delta", text=text))
        )
        self._thinking: ChunkTemplate[int] = ChunkTemplate(
            lambda index, text: _delta(index, ThinkingDelta(type="thinking_delta", thinking=text))
        )
        self._input: ChunkTemplate[int] = ChunkTemplate(
            lambda index, text: _delta(
                index, InputDelta(type="input_json_delta", partial_json=text)
            )
        )

    def begin(self) -> Sequence[StreamEvent]:
        """What came from the cache is known at the end."""
        usage = Usage(self._answering.accepted.prompt_tokens, 0)
        message = self._answering.message([], usage, None)
        return [_event(MessageStart(type="message_start", message=message)), PING]

    def feed(self, prompt: int, event: Event) -> Sequence[StreamEvent]:
        match event:
            case Text(text=text):
                return [*self._opened("text"), self._filled(self._text, text)]
            case ReasoningDelta(text=text):
                return self._thought(text)
            case ToolCallStart():
                block = AnswerToolUse(
                    type="tool_use", id=call_id(event.id), name=event.name, input={}
                )
                return [*self._closed(), *self._begun("tool_use", block)]
            case ToolCallDelta(arguments=arguments):
                return [self._filled(self._input, arguments)]
            case Finished():
                self._finished = event
                return self._closed()
            case PromptScored():
                return ()

    def idle(self) -> StreamEvent:
        return PING

    def end(self, usage: Usage) -> Sequence[StreamEvent]:
        answering, finished = self._answering, self._finished
        assert finished is not None
        delta = MessageDelta(
            type="message_delta",
            delta=Stopped(
                stop_reason=stop_reason(finished, answering.body), stop_sequence=finished.stop
            ),
            usage=delta_usage(usage, answering.marked),
        )
        if answering.body.context_management is not None:
            delta.context_management = NO_EDITS
        return [_event(delta), _event(MessageStop(type="message_stop"))]

    def _thought(self, text: str) -> Sequence[StreamEvent]:
        if self._answering.drops_thinking:
            return ()
        opened = self._opened("thinking")
        self._thoughts.append(text)
        if self._answering.shows_thinking:
            return [*opened, self._filled(self._thinking, text)]
        return opened

    def _filled(self, template: ChunkTemplate[int], text: str) -> StreamEvent:
        return StreamEvent(template.fill(self._index, text), "content_block_delta")

    def _opened(self, kind: Literal["text", "thinking"]) -> list[StreamEvent]:
        if self._open == kind:
            return []
        block: AnswerBlock = (
            AnswerText(type="text", text="")
            if kind == "text"
            else AnswerThinking(type="thinking", thinking="", signature="")
        )
        return [*self._closed(), *self._begun(kind, block)]

    def _begun(self, kind: Kind, block: AnswerBlock) -> list[StreamEvent]:
        self._open = kind
        self._index += 1
        start = BlockStart(type="content_block_start", index=self._index, content_block=block)
        return [_event(start)]

    def _closed(self) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        if self._open == "thinking":
            signature = self._answering.signature("".join(self._thoughts))
            delta = SignatureDelta(type="signature_delta", signature=signature)
            events.append(StreamEvent(_delta(self._index, delta), "content_block_delta"))
            self._thoughts = []
        if self._open is not None:
            events.append(_event(BlockStop(type="content_block_stop", index=self._index)))
            self._open = None
        return events


def _delta(index: int, delta: Delta) -> bytes:
    return BlockDelta(type="content_block_delta", index=index, delta=delta).to_json()


def _event(body: EventBody) -> StreamEvent:
    return StreamEvent(body.to_json(), body.type)
