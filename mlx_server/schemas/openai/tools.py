"""OpenAI's wire format of tools."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from mlx_server.schemas.objects import Name, RequestObject
from mlx_server.schemas.openai.constraints import Text
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


class Grammar(RequestObject):
    syntax: Literal["lark", "regex"]
    definition: Text


class CustomFormat(RequestObject):
    """What a custom tool's input must match."""

    type: Literal["text", "grammar"] = "text"
    grammar: Grammar | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.type == "grammar" and self.grammar is None:
            raise ValueError("a format of type 'grammar' must have a `grammar`")
        return self


class CustomDefinition(RequestObject):
    """A tool that takes a text of any form."""

    name: Name
    description: str | None = None
    format: CustomFormat = Field(default_factory=CustomFormat)


def _function_alone(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "function":
        raise ValueError(
            f"tools of type '{kind[:40]}' are not supported: functions and custom tools are"
        )
    return kind


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "custom" if kind == "custom" else "function"


KIND = Discriminator(_kind)


FunctionType = Annotated[Literal["function"], BeforeValidator(_function_alone)]


class Tool(RequestObject):
    type: FunctionType = "function"
    function: FunctionDefinition


class CustomTool(RequestObject):
    type: Literal["custom"]
    custom: CustomDefinition


AnyTool = Annotated[Annotated[Tool, Tag("function")] | Annotated[CustomTool, Tag("custom")], KIND]


class FunctionName(RequestObject):
    name: str


class NamedTool(RequestObject):
    type: FunctionType = "function"
    function: FunctionName


class NamedCustomTool(RequestObject):
    type: Literal["custom"]
    custom: FunctionName

    @property
    def function(self) -> FunctionName:
        return self.custom


AnyNamedTool = Annotated[
    Annotated[NamedTool, Tag("function")] | Annotated[NamedCustomTool, Tag("custom")], KIND
]


class AllowedTools(RequestObject):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AnyNamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(RequestObject):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | NamedCustomTool | AllowedToolChoice
FunctionChoice = Literal["none", "auto"] | FunctionName

Item = TypeVar("Item")
Few = Annotated[
    list[Item], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(check_size)
]
