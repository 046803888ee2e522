"""Anthropic's wire format of tools."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic.config import JsonDict

from mlx_server.schemas.anthropic.blocks import Block
from mlx_server.schemas.objects import Name, RequestObject
from mlx_server.schemas.sizes import check_size

MAX_TOOLS = 512
NOT_CUSTOM: JsonDict = {"not": {"const": "custom"}}


class CustomTool(Block):
    """`defer_loading`: shown once a result refers to it."""

    type: Literal["custom"] = "custom"
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool = False
    defer_loading: bool = False

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.input_schema.get("type", "object") != "object":
            raise ValueError("`input_schema` must be a JSON schema of type 'object'")
        return self


class HostedTool(Block):
    """One whose definition, or whose work, is Anthropic's. Listing it does no harm."""

    type: Annotated[str, Field(json_schema_extra=NOT_CUSTOM)]
    name: str | None = None


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "custom" if kind in (None, "custom") else "hosted"


Tool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_kind),
]


def _small_schemas(tools: Any) -> Any:
    if isinstance(tools, list):
        check_size([tool.get("input_schema") for tool in tools if isinstance(tool, dict)])
    return tools


Tools = Annotated[
    list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_small_schemas)
]


class AnyToolChoice(RequestObject):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool = False


class OneToolChoice(RequestObject):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class NoToolChoice(RequestObject):
    type: Literal["none"]


ToolChoice = Annotated[AnyToolChoice | OneToolChoice | NoToolChoice, Field(discriminator="type")]
