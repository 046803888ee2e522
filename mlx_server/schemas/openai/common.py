"""What OpenAI's requests and responses have in common. Shapes and their checks only.

A response model is sent with what was set on it and nothing else, so that a key can be null
(`refusal`), absent (`usage` in most chunks) or a value, as OpenAI's description has it.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_server.errors import BadRequest
from mlx_server.units import DURATION, parse_seconds

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_STOPS = 16
MAX_BIASES = 2048
MAX_KEEP_ALIVE = 10**9
MAX_DURATION = 32
LEAST_REPETITION_PENALTY = 0.01
"""A logit is divided by it, and must stay finite."""
FOR_GOOD = -1.0
LOWEST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that OpenAI knows and this server does not honour.

    `harmless` recognises the values that ask for nothing, which are accepted.
    """

    harmless: Callable[[Any, dict[str, Any]], bool]
    hint: str = "leave it out"


def never(value: Any, body: dict[str, Any]) -> bool:
    """No value is harmless."""
    return False


def empty(value: Any, body: dict[str, Any]) -> bool:
    """Nothing is asked for."""
    return value in ("", [], {})


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """The JSON schema of a field that can also be null."""
    if isinstance(field.get("type"), str) and not {"const", "enum"} & field.keys():
        return {**field, "type": [field["type"], "null"]}
    null = {"type": "null"}
    if "anyOf" not in field:
        return {"anyOf": [field, null]}
    return field if null in field["anyOf"] else {**field, "anyOf": [*field["anyOf"], null]}


class Lenient(BaseModel):
    """A request object: exact types, unknown fields tolerated, null meaning the default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, Refusal]] = {}
    tolerated: ClassVar[Mapping[str, str]] = {}
    """Fields that OpenAI knows and that change nothing here, with a remark on each."""

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
        _refuse(cls.unsupported, given)
        return given


def _refuse(unsupported: Mapping[str, Refusal], body: dict[str, Any]) -> None:
    """Raise BadRequest for the first field of `body` that cannot be honoured."""
    for name, refusal in unsupported.items():
        if name in body and not refusal.harmless(body[name], body):
            raise BadRequest(
                f"`{name}` is not supported by this server: {refusal.hint}.",
                param=name,
                code="unsupported_parameter",
            )


class StreamOptions(Lenient):
    """What a stream carries besides the text."""

    include_usage: bool = False


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
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


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class ModelRequest(Lenient):
    """What all work for a model has in common."""

    model: NonEmpty
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays loaded afterwards: seconds, or a text such as `5m`; "
        "-1 for good.",
    )
    priority: int = Field(
        0, ge=-INT32_MAX, le=INT32_MAX, description="Lower ones are admitted first."
    )


class GenerationRequest(ModelRequest):
    """What chat completions and completions have in common."""

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

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


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


class ErrorDetails(Body):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Body):
    """The body of every answer that is not a success."""

    error: ErrorDetails


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can carry."""
    if logprob is None or math.isnan(logprob):
        return LOWEST_LOGPROB
    return max(logprob, LOWEST_LOGPROB)
