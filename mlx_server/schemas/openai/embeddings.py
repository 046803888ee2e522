"""OpenAI's wire format of embeddings."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_server.schemas.objects import INT32_MAX, NonEmpty, ResponseObject
from mlx_server.schemas.openai.common import ModelRequest, TokenIds

MAX_INPUTS = 2048

EmbeddingInput = (
    NonEmpty
    | TokenIds
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
)


class EmbeddingRequest(ModelRequest):
    input: EmbeddingInput = Field(
        description="A text, or several; or their token ids, which are taken as they are."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`base64` is of little-endian float32 numbers."
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        le=INT32_MAX,
        description="Keep that many of a vector's first numbers, scaled to length 1.",
    )
    user: str | None = Field(None, description="Accepted, and not used.")


class Embedding(ResponseObject):
    """Numbers, or their bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseObject):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseObject):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
