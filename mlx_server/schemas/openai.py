"""OpenAI's wire formats: chat completions, completions, models. Shapes and their checks only.

A response model is sent with what was set on it and nothing else, so that a key can be null
(`refusal`), absent (`usage` in most chunks) or a value, as OpenAI's description has it.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.config import JsonDict, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import TokenLogprob
from mlx_server.utils.units import DURATION, parse_seconds

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_STOPS = 16
MAX_BIASES = 2048
MAX_PROMPTS = 256
MAX_PIECES = 10_000
"""Checking them takes some 50 ms, in which no other request is served."""
MAX_KEEP_ALIVE = 10**9
MAX_DURATION = 32
LEAST_REPETITION_PENALTY = 0.01
"""A logit is divided by it, and must stay finite."""
FOR_GOOD = -1.0
LOWEST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


# what this server cannot honour yet


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that OpenAI knows and this server does not honour.

    `harmless` recognises the values that ask for nothing, which are accepted.
    """

    harmless: Callable[[Any, dict[str, Any]], bool]
    hint: str = "leave it out"


def _never(value: Any, body: dict[str, Any]) -> bool:
    return False


def _empty(value: Any, body: dict[str, Any]) -> bool:
    return value in ("", [], {})


UNSUPPORTED: dict[str, dict[str, Refusal]] = {
    "chat": {
        "audio": Refusal(_never),
        "modalities": Refusal(lambda value, body: value == ["text"], 'only ["text"] is'),
        "functions": Refusal(_empty),
        "function_call": Refusal(lambda value, body: value in ("none", "auto")),
        "web_search_options": Refusal(_never),
        "prediction": Refusal(_never),
        "moderation": Refusal(_never),
        "tools": Refusal(_empty),
        "tool_choice": Refusal(lambda value, body: value in ("none", "auto")),
        "response_format": Refusal(
            lambda value, body: value == {"type": "text"}, 'only {"type": "text"} is'
        ),
    },
    "completion": {
        "best_of": Refusal(
            lambda value, body: type(value) is int and value == body.get("n", 1),
            "only a value equal to `n` is",
        ),
        "suffix": Refusal(_empty),
    },
}


def refuse_unsupported(protocol: str, body: dict[str, Any]) -> None:
    """Raise BadRequest for the first field of `body` that cannot be honoured."""
    for name, refusal in UNSUPPORTED[protocol].items():
        if name in body and not refusal.harmless(body[name], body):
            raise BadRequest(
                f"`{name}` is not supported by this server: {refusal.hint}.",
                param=name,
                code="unsupported_parameter",
            )


# requests


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """The JSON schema of a field that can also be null."""
    if isinstance(field.get("type"), str):
        return {**field, "type": [field["type"], "null"]}
    null = {"type": "null"}
    if "anyOf" not in field:
        return {"anyOf": [field, null]}
    return field if null in field["anyOf"] else {**field, "anyOf": [*field["anyOf"], null]}


class Lenient(BaseModel):
    """A request object: exact types, unknown fields tolerated, null meaning the default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    protocol: ClassVar[str | None] = None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        for name, field in described["properties"].items():
            if name not in described.get("required", ()):
                described["properties"][name] = _or_null(field)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        if cls.protocol is not None:
            refuse_unsupported(cls.protocol, given)
        return given


class StreamOptions(Lenient):
    """What a stream carries besides the text."""

    include_usage: bool = False


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Stops = NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOPS, fail_fast=True)]


def _bias_ids(value: Any) -> Any:
    """Token ids from the keys, which JSON can only write as strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} entries")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError("keys must be token ids, such as '50256'")
    return {int(key): bias for key, bias in value.items()}


Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False})
LogitBias = Annotated[
    dict[int, Bias],
    Biases,
    BeforeValidator(
        _bias_ids,
        json_schema_input_type=Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Bias], Biases
        ],
    ),
]


def _seconds(value: Any) -> Any:
    """Seconds from a number, or from a text such as '5m'; negative means for good."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be a number of seconds or a text such as '5m'")
    if isinstance(value, str):
        if not re.fullmatch(DURATION, value) or len(value) > MAX_DURATION:
            raise ValueError("must be a number of seconds or a text such as '90s', '5m', '-1'")
        seconds = parse_seconds(value)
        value = FOR_GOOD if seconds is None else seconds
    if value > MAX_KEEP_ALIVE:
        raise ValueError(f"must be at most {MAX_KEEP_ALIVE} seconds; -1 means for good")
    if value == -math.inf:
        raise ValueError("must be a finite number; -1 means for good")
    return float(value) if value >= 0 else FOR_GOOD


KeepAlive = Annotated[
    float,
    BeforeValidator(
        _seconds,
        json_schema_input_type=Annotated[float, Field(le=MAX_KEEP_ALIVE)]
        | Annotated[str, StringConstraints(pattern=DURATION, max_length=MAX_DURATION)],
    ),
]


class GenerationRequest(Lenient):
    """What chat completions and completions have in common."""

    model: NonEmpty
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=LEAST_REPETITION_PENALTY, le=2)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT32_MAX, description="0 or -1 for no limit.")
    min_p: float = Field(0.0, ge=0, le=1)
    logit_bias: LogitBias = Field(default_factory=dict)
    n: int = Field(1, ge=1, le=INT32_MAX)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: Stops | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    ignore_eos: bool = Field(False, description="Go on past the model's own stop tokens.")
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays loaded afterwards: seconds, or a text such as `5m`; "
        "-1 for good.",
    )
    priority: int = Field(
        0, ge=-INT32_MAX, le=INT32_MAX, description="Lower ones are admitted first."
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


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

    protocol: ClassVar[str | None] = "chat"

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


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
PromptInput = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    protocol: ClassVar[str | None] = "completion"

    prompt: PromptInput
    max_tokens: int = Field(16, ge=0, le=INT32_MAX, description="0 with `echo` only.")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _has_something_to_do(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("`max_tokens` can be 0 only with `echo: true`.", param="max_tokens")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, in a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


# responses


class Body(BaseModel):
    """A response object."""

    def to_json(self) -> bytes:
        """What was set, as JSON."""
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)


class PromptTokensDetails(Body):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Body):
    """What the completion's tokens were."""

    reasoning_tokens: int


class CompletionUsage(Body):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


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


class TextLogprobs(Body):
    """The log-probabilities of a completion's tokens, in columns."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def extend(self, more: "TextLogprobs") -> None:
        """Append the tokens of `more`."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class CompletionChoice(Body):
    """One of the texts of a completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class Completion(Body):
    """The answer of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class Model(Body):
    """A model that can be served. Everything after `owned_by` is this server's own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    size: int
    context_length: int | None
    model_type: str | None
    aliases: list[str]


class ModelList(Body):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetails(Body):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Body):
    """The body of every answer that is not a success."""

    error: ErrorDetails


# log-probabilities on the wire


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can carry."""
    if logprob is None or math.isnan(logprob):
        return LOWEST_LOGPROB
    return max(logprob, LOWEST_LOGPROB)


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


def text_logprobs(tokens: Sequence[TokenLogprob], start: int) -> TextLogprobs:
    """Log-probabilities as completions write them, for text that begins at character `start`."""
    return TextLogprobs(
        tokens=[entry.token for entry in tokens],
        token_logprobs=[
            None if entry.logprob is None else finite(entry.logprob) for entry in tokens
        ],
        top_logprobs=[_top_by_token(entry) for entry in tokens],
        text_offset=[start + entry.offset for entry in tokens],
    )


def _top_by_token(entry: TokenLogprob) -> dict[str, float] | None:
    """The alternatives by text, with the token itself, whether or not it is among them."""
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    # Different tokens can have one text, such as two halves of a character: the likelier stays.
    for other in entry.top:
        top.setdefault(other.token, finite(other.logprob))
    top.setdefault(entry.token, finite(entry.logprob))
    return top
