"""OpenAI's wire format of models."""

from typing import Literal

from mlx_server.schemas.base import ResponseObject


class ModelCapabilities(ResponseObject):
    """What a model can be asked for."""

    chat: bool
    tools: bool
    native_tools: bool
    reasoning: bool
    structured_output: bool
    embeddings: bool


class Model(ResponseObject):
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
    capabilities: ModelCapabilities | None


class ModelList(ResponseObject):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]
