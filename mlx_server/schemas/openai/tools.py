"""OpenAI's wire format of tools."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from mlx_server.schemas.objects import Name, RequestObject
from mlx_server.schemas.sizes import check_size

MAX_TOOLS = 128


class FunctionDefinition(RequestObject):
    """`parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters.get("type", "object") != "object":
            raise ValueError("`parameters` must be a JSON schema of type 'object'")
        return self


def _function_alone(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of type '{kind[:40]}' are not supported: functions are")
    return kind


FunctionType = Annotated[Literal["function"], BeforeValidator(_function_alone)]


class Tool(RequestObject):
    type: FunctionType = "function"
    function: FunctionDefinition


class FunctionName(RequestObject):
    name: str


class NamedTool(RequestObject):
    type: FunctionType = "function"
    function: FunctionName


class AllowedTools(RequestObject):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(RequestObject):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice
FunctionChoice = Literal["none", "auto"] | FunctionName

Item = TypeVar("Item")
Few = Annotated[
    list[Item], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(check_size)
]
