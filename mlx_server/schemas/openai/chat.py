"""OpenAI's wire format of chat completions."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import TokenLogprob
from mlx_server.schemas.openai.common import (
    INT32_MAX,
    Body,
    CompletionUsage,
    GenerationRequest,
    Lenient,
    Refusal,
    empty,
    finite,
    never,
)

MAX_PIECES = 10_000
"""Checking them takes some 50 ms, in which no other request is served."""

UNSUPPORTED: Mapping[str, Refusal] = {
    "audio": Refusal(never),
    "modalities": Refusal(lambda value, body: value == ["text"], 'only ["text"] is'),
    "functions": Refusal(empty),
    "function_call": Refusal(lambda value, body: value in ("none", "auto")),
    "web_search_options": Refusal(never),
    "prediction": Refusal(never),
    "moderation": Refusal(never),
    "tools": Refusal(empty),
    "tool_choice": Refusal(lambda value, body: value in ("none", "auto")),
    "response_format": Refusal(
        lambda value, body: value == {"type": "text"}, 'only {"type": "text"} is'
    ),
}
"""What of a chat completion's fields is not honoured."""


def _having(required: Sequence[str], **properties: JsonValue) -> JsonDict:
    """The JSON schema of objects with these properties, the required ones not null."""
    given: dict[str, JsonValue] = {name: {"not": {"type": "null"}} for name in required}
    return {"required": list(required), "properties": given | properties}


class ContentPart(Lenient):
    """A part of a message. Text is all that this server reads."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                _having(["text"], type={"const": "text"}),
                _having(["refusal"], type={"const": "refusal"}),
            ]
        }
    )

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type not in ("text", "refusal"):
            raise ValueError(
                f"content parts of type '{self.type[:40]}' are not supported: "
                "this server takes text only"
            )
        if (self.text if self.type == "text" else self.refusal) is None:
            raise ValueError(f"a part of type '{self.type}' must have a string `{self.type}`")
        return self

    @property
    def value(self) -> str:
        """The part's text."""
        return (self.text if self.type == "text" else self.refusal) or ""


class FunctionCall(Lenient):
    """What an earlier tool call asked for."""

    name: str
    arguments: str = "{}"


class ToolCall(Lenient):
    """A tool call that the assistant made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates read it: arguments are an object where they can be."""
        return {
            "id": self.id,
            "type": self.type,
            "function": {
                "name": self.function.name,
                "arguments": _object_or_text(self.function.arguments),
            },
        }


def _object_or_text(text: str) -> Any:
    """The JSON object in `text`, or `text` itself when it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


class Message(Lenient):
    """One turn of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                _having(
                    ["content"],
                    role={"enum": ["system", "developer", "user"]},
                    tool_calls={"type": ["array", "null"], "maxItems": 0},
                ),
                _having(
                    ["content", "tool_call_id"],
                    role={"const": "tool"},
                    tool_calls={"type": ["array", "null"], "maxItems": 0},
                ),
                _having(["content"], role={"const": "assistant"}),
                _having(["refusal"], role={"const": "assistant"}),
                _having(
                    ["tool_calls"],
                    role={"const": "assistant"},
                    tool_calls={"type": "array", "minItems": 1},
                ),
            ]
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' must have a `tool_call_id`")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' cannot have `tool_calls`")
        optional = self.role == "assistant" and (self.tool_calls or self.refusal is not None)
        if self.content is None and not optional:
            raise ValueError(f"a message of role '{self.role}' must have `content`")
        return self

    @property
    def text(self) -> str:
        """The content in one string; parts stand on lines of their own."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.value for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        for field in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, field)
            if value is not None:
                message[field] = value
        return message


def _few_pieces(messages: Any) -> Any:
    """Refuse more messages, parts and tool calls than can be looked at one by one in no time."""
    if not isinstance(messages, list):
        return messages
    pieces = len(messages)
    if pieces <= MAX_PIECES:
        lists = (
            message[name]
            for message in messages
            if isinstance(message, dict)
            for name in ("content", "tool_calls")
            if isinstance(message.get(name), list)
        )
        pieces += sum(map(len, lists))
    if pieces > MAX_PIECES:
        raise ValueError(f"must have at most {MAX_PIECES} messages, parts and tool calls in all")
    return messages


class ChatCompletionRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED

    messages: Annotated[
        list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_pieces)
    ]
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Wins over `max_tokens`."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the model's chat template."
    )

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        return self


class TopLogprob(Body):
    """A token that could have stood at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """The log-probability of a token, with the most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Body):
    """The log-probabilities of a choice's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(Body):
    """A complete answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(Body):
    """One of the answers of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Body):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatDelta(Body):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Body):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Body):
    """One event of a streamed chat completion. `usage` is set only if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities as chat completions write them."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=entry.token,
                logprob=finite(entry.logprob),
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(
                        token=other.token, logprob=finite(other.logprob), bytes=list(other.bytes)
                    )
                    for other in entry.top
                ],
            )
            for entry in tokens
        ],
        refusal=None,
    )
