"""OpenAI's wire format of models."""

from typing import Literal

from mlx_server.schemas.openai.common import Body


class Model(Body):
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


class ModelList(Body):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]
