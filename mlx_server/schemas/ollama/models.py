"""Ollama's wire format of models."""

from typing import Annotated, Any

from pydantic import AliasChoices, Field

from mlx_server.schemas.objects import NonEmpty, RequestObject, ResponseObject

Named = Annotated[
    NonEmpty,
    Field(validation_alias=AliasChoices("model", "name"), description="Also taken as `name`."),
]


class NameRequest(RequestObject):
    model: Named


class ModelShow(NameRequest):
    verbose: bool = Field(False, description="Accepted; there is no more to tell.")


class ModelPull(NameRequest):
    stream: bool = True
    insecure: bool = Field(False, description="Accepted, and not used.")


class ModelDelete(NameRequest): ...


class Details(ResponseObject):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class LocalModel(ResponseObject):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: list[str]
    context_length: int | None


class LocalModels(ResponseObject):
    models: list[LocalModel]


class RunningModel(ResponseObject):
    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class RunningModels(ResponseObject):
    models: list[RunningModel]


class ShowResponse(ResponseObject):
    license: str
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(ResponseObject):
    version: str


class PullProgress(ResponseObject):
    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None
