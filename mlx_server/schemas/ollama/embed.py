"""Ollama's wire format of embeddings."""

from typing import Annotated

from pydantic import Field

from mlx_server.schemas.objects import INT32_MAX, ResponseObject
from mlx_server.schemas.ollama.common import ModelRequest

MAX_INPUTS = 2048


class EmbedRequest(ModelRequest):
    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)] = Field(
        default_factory=list, description="A text, or several; none: the model is loaded."
    )
    truncate: bool = Field(True, description="Cut texts to the model's context.")
    dimensions: int | None = Field(None, ge=0, le=INT32_MAX, description="0: all.")


class EmbeddingsRequest(ModelRequest):
    prompt: str = Field("", description="Empty: the model is loaded.")


class EmbedResponse(ResponseObject):
    """Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsResponse(ResponseObject):
    embedding: list[float]
