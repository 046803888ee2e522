"""`/tokenize` and `/detokenize`, as in llama.cpp and vLLM."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import AliasChoices, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from mlx_server.errors import BadRequest
from mlx_server.schemas.objects import Refusal, ResponseObject
from mlx_server.schemas.openai.chat import PromptOptions
from mlx_server.schemas.openai.common import ModelChoice, TokenId, WholeItems
from mlx_server.schemas.openai.messages import Messages, having

MAX_TOKENS = 1_000_000

ABSENT: JsonDict = {"type": "null"}


class TokenizeRequest(ModelChoice, PromptOptions):
    """A text, or a conversation as chat completions take it."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                having(["prompt"], content=ABSENT, messages=ABSENT),
                having(["content"], prompt=ABSENT, messages=ABSENT),
                having(["messages"], prompt=ABSENT, content=ABSENT),
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, Refusal]] = {
        "add_generation_prompt": Refusal(lambda value, body: value is True, "only true is"),
        "parse_special": Refusal(lambda value, body: value is True, "only true is"),
    }

    content: str | None = Field(None, description="llama.cpp's name for `prompt`.")
    prompt: str | None = None
    messages: Messages | None = None
    add_special: bool = Field(
        True,
        validation_alias=AliasChoices("add_special", "add_special_tokens"),
        description="Whether a text begins as one for `/v1/completions` does.",
    )
    with_pieces: bool = Field(False, description="Give each token with its text.")
    return_token_strs: bool = Field(False, description="Give the tokens' texts as `token_strs`.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [one for one in (self.content, self.prompt, self.messages) if one is not None]
        if len(given) != 1:
            raise BadRequest("Give one of `prompt`, `content` and `messages`.", param="prompt")
        return self


class DetokenizeRequest(ModelChoice):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True), WholeItems]


class TokenPiece(ResponseObject):
    """The token's text, or its bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class Tokenized(ResponseObject):
    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Detokenized(ResponseObject):
    """The text under llama.cpp's name and vLLM's."""

    content: str
    prompt: str
