"""OpenAI's wire format of completions."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import TokenLogprob
from mlx_server.schemas.openai.common import (
    INT32_MAX,
    Body,
    CompletionUsage,
    Refusal,
    TokenIds,
    empty,
    finite,
)
from mlx_server.schemas.openai.constraints import ConstrainedRequest

MAX_PROMPTS = 256

UNSUPPORTED: Mapping[str, Refusal] = {
    "best_of": Refusal(
        lambda value, body: type(value) is int and value == body.get("n", 1),
        "only a value equal to `n` is",
    ),
    "suffix": Refusal(empty, "it does not fill in"),
}
"""What of a completion's fields is not honoured."""

TOLERATED: Mapping[str, str] = {"user": "Callers are told apart by their keys."}
"""Fields that change nothing here."""

PromptInput = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(ConstrainedRequest):
    """The body of `POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED
    tolerated: ClassVar[Mapping[str, str]] = TOLERATED

    prompt: PromptInput = Field(description="A text, token ids, or a list of either.")
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
