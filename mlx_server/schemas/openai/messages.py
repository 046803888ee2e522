"""OpenAI's wire format of a conversation: messages, their parts, and calls made earlier."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from mlx_server.schemas.openai.common import Lenient

MAX_PIECES = 10_000
"""Checking them takes some 50 ms, in which no other request is served."""
OLD_CALL_ID = "call00000"
"""Stands for the id that calls of the deprecated `functions` lack. Some templates insist on nine
letters and digits."""


def having(required: Sequence[str], **properties: JsonValue) -> JsonDict:
    """The JSON schema of objects with these properties, the required ones not null."""
    given: dict[str, JsonValue] = {name: {"not": {"type": "null"}} for name in required}
    return {"required": list(required), "properties": given | properties}


class ContentPart(Lenient):
    """A part of a message. Text is all that this server reads."""

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

    @property
    def value(self) -> str:
        """The part's text."""
        return (self.text if self.type == "text" else self.refusal) or ""


class FunctionCall(Lenient):
    """What an earlier tool call asked for."""

    name: str
    arguments: str = "{}"

    def for_template(self, call_id: str) -> dict[str, Any]:
        """The call as chat templates read it: arguments are an object where they can be."""
        function = {"name": self.name, "arguments": _object_or_text(self.arguments)}
        return {"id": call_id, "type": "function", "function": function}


class ToolCall(Lenient):
    """A tool call that the assistant made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates read it."""
        return self.function.for_template(self.id)


def _object_or_text(text: str) -> Any:
    """The JSON object in `text`, or `text` itself when it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


NO_CALLS: JsonDict = {"type": ["array", "null"], "maxItems": 0}


class Message(Lenient):
    """One turn of a conversation."""

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
                having(["content"], role={"const": "assistant"}),
                having(["refusal"], role={"const": "assistant"}),
                having(["function_call"], role={"const": "assistant"}),
                having(
                    ["tool_calls"],
                    role={"const": "assistant"},
                    tool_calls={"type": "array", "minItems": 1},
                ),
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

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' must have a `tool_call_id`")
        if self.role == "function" and self.name is None:
            raise ValueError("a message of role 'function' must have a `name`")
        if self.calls and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' cannot have tool calls")
        optional = self.role == "assistant" and (self.calls or self.refusal is not None)
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

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls that it makes, as chat templates read them."""
        calls = [call.for_template() for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append(self.function_call.for_template(OLD_CALL_ID))
        return calls

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.text}
        if calls := self.calls:
            message["tool_calls"] = calls
        if self.role == "function":
            message["tool_call_id"] = OLD_CALL_ID
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


Messages = Annotated[
    list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_pieces)
]
