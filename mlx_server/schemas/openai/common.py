"""Shared by OpenAI's requests and responses."""

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from mlx_server.schemas.objects import (
    INT32_MAX,
    INT64_MAX,
    KeepAlive,
    RequestObject,
    ResponseObject,
    whole,
)

MAX_STOPS = 256
MAX_BIASES = 2048
LEAST_REPETITION_PENALTY = 0.01
"""Divides a logit, which must stay finite."""

ANY_SEED = -1
Stops = str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]


def _whole_items(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        # Only now: there may be millions.
        if not (isinstance(value, list) and float in map(type, value)):
            raise
    return check([whole(item) for item in value])


WholeItems = WrapValidator(_whole_items)
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), WholeItems]


def _bias_ids(value: Any) -> Any:
    """Ids are strings, as JSON's keys."""
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


class StreamOptions(RequestObject):
    include_usage: bool = False


class ModelChoice(RequestObject):
    model: str = Field("", description="Left out, null or empty: the loaded model, if one is.")


class ModelRequest(ModelChoice):
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays loaded afterwards: seconds, or a text such as `5m`; "
        "-1 for good.",
    )
    priority: int = Field(
        0,
        ge=-INT32_MAX,
        le=INT32_MAX,
        description="Lower ones are admitted first. Below 0 needs an admin key, if there are keys.",
    )


class GenerationRequest(ModelRequest):
    """What chat completions and completions share."""

    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=LEAST_REPETITION_PENALTY, le=2)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT32_MAX, description="0 or -1 for no limit.")
    min_p: float = Field(0.0, ge=0, le=1)
    logit_bias: LogitBias = Field(default_factory=dict)
    n: int = Field(1, ge=1, le=INT32_MAX)
    seed: int | None = Field(
        None, ge=-INT64_MAX - 1, le=INT64_MAX, description="-1, as none, for a random one."
    )
    stop: Stops = Field(default_factory=list, description="Empty texts do not count.")
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    ignore_eos: bool = Field(False, description="Go on past the model's own stop tokens.")


class PromptTokensDetails(ResponseObject):
    cached_tokens: int


class CompletionTokensDetails(ResponseObject):
    """`accepted_prediction_tokens` came true of all that were guessed, by a `prediction` or not."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(ResponseObject):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ErrorDetails(ResponseObject):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseObject):
    error: ErrorDetails
