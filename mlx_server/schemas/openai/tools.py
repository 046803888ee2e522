"""OpenAI's wire format of tools: their definitions, and which of them may or must be called."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import ToolUse
from mlx_server.schemas.openai.common import Lenient, Name
from mlx_server.schemas.openai.constraints import check_size

MAX_TOOLS = 128


class FunctionDefinition(Lenient):
    """A function that the model may call, and the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters.get("type", "object") != "object":
            raise ValueError("`parameters` must be a JSON schema of type 'object'")
        return self

    def for_template(self) -> dict[str, Any]:
        """The function as chat templates read it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        # Templates look into both; a function without parameters takes an empty object.
        bare = {"type": "object"} if self.parameters else {"type": "object", "properties": {}}
        return function | {"parameters": bare | self.parameters}


def _function_alone(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of type '{kind[:40]}' are not supported: functions are")
    return kind


FunctionType = Annotated[Literal["function"], BeforeValidator(_function_alone)]


class Tool(Lenient):
    """A tool that the model may call."""

    type: FunctionType = "function"
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        return {"type": "function", "function": self.function.for_template()}

    def for_use(self) -> dict[str, Any]:
        """The same, and whether its arguments must validate whenever it is called."""
        function = self.function.for_template() | {"strict": self.function.strict}
        return {"type": "function", "function": function}


class FunctionName(Lenient):
    """The name of a function."""

    name: str


class NamedTool(Lenient):
    """One of the tools."""

    type: FunctionType = "function"
    function: FunctionName

    @property
    def name(self) -> str:
        """The function's."""
        return self.function.name


class AllowedTools(Lenient):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(Lenient):
    """That some of the tools alone may, or must, be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice
FunctionChoice = Literal["none", "auto"] | FunctionName

Item = TypeVar("Item")
Few = Annotated[
    list[Item], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(check_size)
]


def tool_use(tools: Sequence[Tool], choice: ToolChoice, parallel: bool) -> ToolUse | None:
    """What may come of `tools`; None when none may be called. Raises BadRequest."""
    _check_names(tools)
    if choice == "none" or (choice == "auto" and not tools):
        return None
    if not tools:
        raise BadRequest("There are no tools to choose from.", param="tool_choice")
    if isinstance(choice, NamedTool):
        # OpenAI: exactly one call.
        named = [tool.for_use() for tool in _only(tools, [choice.name])]
        return ToolUse(named, "named", choice.name, parallel=False)
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        tools = _only(tools, [tool.name for tool in allowed.tools])
        return ToolUse([tool.for_use() for tool in tools], allowed.mode, parallel=parallel)
    return ToolUse([tool.for_use() for tool in tools], choice, parallel=parallel)


def _only(tools: Sequence[Tool], names: Sequence[str]) -> list[Tool]:
    """Those of `tools` with one of these names, which must all exist."""
    known = {tool.function.name for tool in tools}
    for name in names:
        if name not in known:
            raise BadRequest(f"There is no tool '{name[:64]}' to choose.", param="tool_choice")
    return [tool for tool in tools if tool.function.name in names]


def _check_names(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for tool in tools:
        name = tool.function.name
        if name in seen:
            raise BadRequest(f"There are two tools of the name '{name}'.", param="tools")
        seen.add(name)
