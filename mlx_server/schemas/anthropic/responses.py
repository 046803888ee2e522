"""Anthropic's wire format of answers and their events."""

from typing import Any, Literal

from mlx_server.schemas.objects import ResponseObject

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class ErrorCause(ResponseObject):
    error_code: str


class ErrorObject(ResponseObject):
    """`details` name the cause, where there is a name."""

    type: str
    message: str
    details: ErrorCause | None = None


class MessagesError(ResponseObject):
    type: Literal["error"]
    error: ErrorObject
    request_id: str


class OutputTokensDetails(ResponseObject):
    thinking_tokens: int


class DeltaUsage(ResponseObject):
    """A prompt's tokens are the sum of the first three."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageUsage(DeltaUsage):
    service_tier: Literal["standard"]


class AnswerText(ResponseObject):
    type: Literal["text"]
    text: str


class AnswerThinking(ResponseObject):
    type: Literal["thinking"]
    thinking: str
    signature: str


class AnswerToolUse(ResponseObject):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


class ContextManagement(ResponseObject):
    applied_edits: list[None]


class Message(ResponseObject):
    """`context_management` answers one that was asked for."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    context_management: ContextManagement | None = None


class TokenCount(ResponseObject):
    input_tokens: int


class MessageStart(ResponseObject):
    type: Literal["message_start"]
    message: Message


class BlockStart(ResponseObject):
    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


class TextDelta(ResponseObject):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(ResponseObject):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(ResponseObject):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(ResponseObject):
    type: Literal["input_json_delta"]
    partial_json: str


Delta = TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockDelta(ResponseObject):
    type: Literal["content_block_delta"]
    index: int
    delta: Delta


class BlockStop(ResponseObject):
    type: Literal["content_block_stop"]
    index: int


class Stopped(ResponseObject):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(ResponseObject):
    type: Literal["message_delta"]
    delta: Stopped
    usage: DeltaUsage
    context_management: ContextManagement | None = None


class MessageStop(ResponseObject):
    type: Literal["message_stop"]


class Ping(ResponseObject):
    type: Literal["ping"]


EventBody = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping
