"""What an answer says of itself, whole or streamed."""

from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

from mlx_server.api.anthropic.signatures import digest, holding
from mlx_server.api.anthropic.usage import message_usage, stop_reason
from mlx_server.api.generation import Accepted
from mlx_server.schemas.anthropic.requests import MessagesRequest
from mlx_server.schemas.anthropic.responses import AnswerBlock, ContextManagement, Message
from mlx_server.schemas.internal import Finished, Usage

Kind = Literal["text", "thinking", "tool_use"]
"""Of blocks."""
NO_EDITS = ContextManagement(applied_edits=[])


@dataclass(frozen=True, slots=True)
class Answering:
    """`marked`: whether new tokens count as put into the cache."""

    accepted: Accepted
    body: MessagesRequest
    marked: bool

    @property
    def shows_thinking(self) -> bool:
        thinking = self.body.thinking
        return thinking is None or thinking.display == "summarized"

    @property
    def drops_thinking(self) -> bool:
        """Of a model that thinks though it was told not to."""
        return self.body.thinking is not None and not self.body.thinking.wanted

    def message(
        self, content: list[AnswerBlock], usage: Usage, finished: Finished | None
    ) -> Message:
        message = Message(
            id=f"msg_{uuid4().hex}",
            type="message",
            role="assistant",
            model=self.accepted.model,
            content=content,
            stop_reason=finished and stop_reason(finished, self.body),
            stop_sequence=finished and finished.stop,
            usage=message_usage(usage, self.marked),
        )
        if finished and self.body.context_management is not None:
            message.context_management = NO_EDITS
        return message

    def signature(self, thinking: str) -> str:
        return digest(thinking) if self.shows_thinking else holding(thinking)


def call_id(own: str) -> str:
    return f"toolu_{own.removeprefix('call_')}"
