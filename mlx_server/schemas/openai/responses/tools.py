"""OpenAI's wire format of the tools of Responses, which is flatter than that of chats."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from mlx_server.schemas.objects import Name, RequestObject
from mlx_server.schemas.openai.constraints import Text
from mlx_server.schemas.openai.tools import MAX_TOOLS, FunctionDefinition
from mlx_server.schemas.sizes import check_size

HOSTED = frozenset(
    {
        "file_search",
        "web_search",
        "web_search_2025_08_26",
        "web_search_preview",
        "web_search_preview_2025_03_11",
        "computer",
        "computer_use",
        "computer_use_preview",
        "mcp",
        "code_interpreter",
        "image_generation",
        "local_shell",
        "shell",
        "apply_patch",
        "tool_search",
        "programmatic_tool_calling",
    }
)
"""Tools that OpenAI's servers run, and types of clients' own that models must be trained for."""


class Function(FunctionDefinition):
    type: Literal["function"]


class InputFormat(RequestObject):
    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: Text | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.type == "grammar" and (self.syntax is None or self.definition is None):
            raise ValueError("a format of type 'grammar' must have `syntax` and `definition`")
        return self


class Custom(RequestObject):
    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: InputFormat = Field(default_factory=InputFormat)


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if kind in ("function", "custom", "namespace") else "hosted"


KIND = Discriminator(_kind)
Callable = Annotated[Annotated[Function, Tag("function")] | Annotated[Custom, Tag("custom")], KIND]


class Namespace(RequestObject):
    """A group of tools, which calls name with it."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[Callable], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class Hosted(RequestObject):
    """Passed over, and repeated in the response without what authorizes."""

    model_config = ConfigDict(extra="allow")

    type: str

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: data[key] for key in data if key not in ("authorization", "headers")}

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.type not in HOSTED:
            raise ValueError(f"tools of type '{self.type[:40]}' are not known")
        return self


Tool = Annotated[
    Annotated[Function, Tag("function")]
    | Annotated[Custom, Tag("custom")]
    | Annotated[Namespace, Tag("namespace")]
    | Annotated[Hosted, Tag("hosted")],
    KIND,
]
Tools = Annotated[
    list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(check_size)
]


class Chosen(RequestObject):
    """A function or custom tool, or a hosted one by type alone."""

    type: str
    name: str | None = None
    namespace: str | None = None


class Allowed(RequestObject):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[Chosen], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


ToolChoice = Literal["none", "auto", "required"] | Allowed | Chosen
