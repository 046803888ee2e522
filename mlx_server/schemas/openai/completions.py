"""OpenAI's wire format of completions."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mlx_server.schemas.objects import INT64_MAX, Refusal, ResponseObject, empty
from mlx_server.schemas.openai.common import CompletionUsage, TokenIds
from mlx_server.schemas.openai.constraints import ConstrainedRequest

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256

UNSUPPORTED: Mapping[str, Refusal] = {
    "best_of": Refusal(
        lambda value, body: type(value) is int and value == body.get("n", 1),
        "only a value equal to `n` is",
    ),
    "suffix": Refusal(empty, "it does not fill in"),
}

TOLERATED: Mapping[str, str] = {"user": "Callers are told apart by their keys."}

PromptInput = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(ConstrainedRequest):
    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED
    tolerated: ClassVar[Mapping[str, str]] = TOLERATED

    prompt: PromptInput = Field(description="A text, token ids, or a list of either.")
    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS,
        ge=-1,
        le=INT64_MAX,
        description="Cut to the room that the context has left; -1 sets no limit. 0 is the default "
        "unless there is `echo`.",
    )
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)


class TextLogprobs(ResponseObject):
    """One entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseObject):
    """A whole text, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class Completion(ResponseObject):
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
