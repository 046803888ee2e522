"""Shared by Ollama's requests and responses."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlx_server.schemas.objects import (
    INT32_MAX,
    INT64_MAX,
    KeepAlive,
    Refusal,
    RequestObject,
    ResponseObject,
    empty,
)
from mlx_server.schemas.sizes import Schema

MAX_STOPS = 256
LEAST_REPEAT_PENALTY = 0.01
"""Divides a logit, which must stay finite."""

NO_IMAGES = Refusal(empty, "it takes text only")
Format = Literal["", "json"] | Schema
Think = bool | Literal["low", "medium", "high", "max"]
Stops = str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)]


class Options(RequestObject):
    """Unknown ones are accepted, as Ollama does."""

    tolerated: ClassVar[Mapping[str, str]] = {
        "num_ctx": "The model's whole context serves every request.",
        "num_keep": "A conversation is never shifted.",
        "repeat_last_n": "The penalty looks at the whole text.",
        "typical_p": "There is no such sampling.",
        "tfs_z": "See `typical_p`.",
        "mirostat": "See `typical_p`.",
        "num_batch": "Chosen by the server, as are `num_gpu`, `num_thread` and their like.",
    }

    num_predict: int = Field(-1, ge=-2, le=INT64_MAX, description="0 and below set no limit.")
    temperature: float = Field(0.8, ge=0, le=2)
    top_k: int = Field(40, ge=-1, le=INT32_MAX, description="0 or -1 for no limit.")
    top_p: float = Field(0.9, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX, description="-1: random.")
    stop: Stops = Field(default_factory=list, description="Empty texts do not count.")
    repeat_penalty: float = Field(1.0, ge=LEAST_REPEAT_PENALTY, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)


class ModelRequest(RequestObject):
    model: str = Field("", description="With or without `:latest`. Left out: the loaded model.")
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays loaded afterwards: seconds, or a text such as `5m`; "
        "0 unloads it, -1 keeps it for good.",
    )


class GenerationRequest(ModelRequest):
    """What chat and generate share."""

    tolerated: ClassVar[Mapping[str, str]] = {
        "truncate": "A prompt that does not fit is refused.",
        "shift": "A conversation is never shifted.",
    }

    stream: bool = True
    format: Format = Field("", description="`json`, or a JSON schema that the answer keeps to.")
    options: Options = Field(default_factory=Options)
    think: Think | None = Field(
        None, description="If unset, as the model's template has it; refused where none thinks."
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class TokenLogprob(ResponseObject):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class MadeFunction(ResponseObject):
    index: int
    name: str
    arguments: dict[str, Any]


class CallMade(ResponseObject):
    id: str
    function: MadeFunction


class AnswerMessage(ResponseObject):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[CallMade] | None = None


class AnswerPart(ResponseObject):
    """What answers and their parts share. Durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    logprobs: list[Logprob] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class ChatResponse(AnswerPart):
    message: AnswerMessage


class GenerateResponse(AnswerPart):
    response: str
    thinking: str | None = None


class OllamaError(ResponseObject):
    error: str
