"""OpenAI's wire format of conversations."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from mlx_server.schemas.objects import RequestObject

MAX_PIECES = 10_000
"""Messages, parts and tool calls; checking these takes 50 ms."""


def having(required: Sequence[str], **properties: JsonValue) -> JsonDict:
    """Schema of objects with these properties; required ones are not null."""
    given: dict[str, JsonValue] = {name: {"not": {"type": "null"}} for name in required}
    return {"required": list(required), "properties": given | properties}


class ContentPart(RequestObject):
    """Only text is supported."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                having(["text"], type={"const": "text"}),
                having(["refusal"], type={"const": "refusal"}),
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


class FunctionCall(RequestObject):
    """`arguments` are JSON, whole or not; some clients send the object itself."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class CustomCall(RequestObject):
    name: str
    input: str


class ToolCall(RequestObject):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                having(["function"], type={"const": "function"}),
                having(["custom", "type"], type={"const": "custom"}),
            ]
        }
    )

    id: str
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"a call of type '{self.type}' must have `{self.type}`")
        return self


NO_CALLS: JsonDict = {"type": ["array", "null"], "maxItems": 0}


class Message(RequestObject):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                having(
                    ["content"],
                    role={"enum": ["system", "developer", "user"]},
                    tool_calls=NO_CALLS,
                    function_call={"type": "null"},
                ),
                having(
                    ["content", "tool_call_id"],
                    role={"const": "tool"},
                    tool_calls=NO_CALLS,
                    function_call={"type": "null"},
                ),
                having(
                    ["content", "name"],
                    role={"const": "function"},
                    tool_calls=NO_CALLS,
                    function_call={"type": "null"},
                ),
                having([], role={"const": "assistant"}),
            ]
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_reasoning(cls, data: Any) -> Any:
        """Some servers say `reasoning`, and clients send back what they got."""
        if not isinstance(data, dict) or not isinstance(data.get("reasoning"), str):
            return data
        return {"reasoning_content": data["reasoning"], **data}

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' must have a `tool_call_id`")
        if self.role == "function" and self.name is None:
            raise ValueError("a message of role 'function' must have a `name`")
        calls = self.tool_calls or self.function_call
        if calls and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' cannot have tool calls")
        # An answer that is all thinking has neither content nor calls.
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' must have `content`")
        return self


def _few_pieces(messages: Any) -> Any:
    """Raises ValueError for too many pieces to check one by one."""
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


Messages = Annotated[
    list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_pieces)
]
