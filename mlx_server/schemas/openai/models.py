"""OpenAI's wire format of models."""

from typing import Literal

from mlx_server.schemas.objects import ResponseObject


class ModelCapabilities(ResponseObject):
    chat: bool
    tools: bool
    native_tools: bool
    reasoning: bool
    structured_output: bool
    embeddings: bool
    rerank: bool


class ModelSampling(ResponseObject):
    """What a request that says nothing is sampled with."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Model(ResponseObject):
    """Everything after `owned_by` is this server's own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    size: int
    context_length: int | None
    model_type: str | None
    aliases: list[str]
    default_sampling: ModelSampling
    capabilities: ModelCapabilities | None


class ModelList(ResponseObject):
    object: Literal["list"]
    data: list[Model]
