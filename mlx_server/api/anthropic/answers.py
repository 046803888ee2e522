"""Answers that are not streamed."""

from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from mlx_server.api.anthropic.answering import Answering, Kind, call_id
from mlx_server.schemas.anthropic.responses import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
)
from mlx_server.schemas.internal import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)


@dataclass(slots=True)
class _Block:
    kind: Kind
    texts: list[str] = field(default_factory=list)
    id: str = ""
    name: str = ""


class MessageAnswer:
    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._blocks: list[_Block] = []
        self._finished: Finished | None = None

    def feed(self, prompt: int, event: Event) -> None:
        match event:
            case TextDelta(text=text):
                self._add("text", text)
            case ReasoningDelta(text=text):
                if not self._answering.drops_thinking:
                    self._add("thinking", text)
            case ToolCallStart():
                self._blocks.append(_Block("tool_use", id=call_id(event.id), name=event.name))
            case ToolCallDelta():
                self._blocks[-1].texts.append(event.arguments)
            case Finished():
                self._finished = event

    def body(self, usage: Usage) -> bytes:
        content = [self._written(block) for block in self._blocks]
        return self._answering.message(content, usage, self._finished).to_json()

    def _add(self, kind: Kind, text: str) -> None:
        if not self._blocks or self._blocks[-1].kind != kind:
            self._blocks.append(_Block(kind))
        self._blocks[-1].texts.append(text)

    def _written(self, block: _Block) -> AnswerBlock:
        text = "".join(block.texts)
        match block.kind:
            case "text":
                return AnswerText(type="text", text=text)
            case "thinking":
                shown = text if self._answering.shows_thinking else ""
                signature = self._answering.signature(text)
                return AnswerThinking(type="thinking", thinking=shown, signature=signature)
            case "tool_use":
                return AnswerToolUse(
                    type="tool_use", id=block.id, name=block.name, input=_object(text)
                )


def _object(arguments: str) -> dict[str, Any]:
    """As far as they came before a limit."""
    value = from_json(arguments or "{}", allow_partial="trailing-strings")
    return value if isinstance(value, dict) else {}
