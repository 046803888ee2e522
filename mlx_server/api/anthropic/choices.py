"""Which tools may be called."""

from collections.abc import Sequence
from typing import Any

from mlx_server.api.tools import function_tool
from mlx_server.errors import BadRequest
from mlx_server.schemas.anthropic.tools import (
    AnyToolChoice,
    CustomTool,
    NoToolChoice,
    OneToolChoice,
    ToolChoice,
)
from mlx_server.schemas.internal import ToolUse

PARAM = "tool_choice"


def tool_use(tools: Sequence[CustomTool], choice: ToolChoice | None) -> ToolUse | None:
    """Raises BadRequest."""
    match choice:
        case NoToolChoice():
            return None
        case OneToolChoice(name=name):
            named = [_callable(tool) for tool in tools if tool.name == name]
            if not named:
                raise BadRequest(f"There is no tool '{name[:64]}' to choose.", param=PARAM)
            return ToolUse(named, "named", name, parallel=False)
        case AnyToolChoice(type="any") if not tools:
            raise BadRequest("There are no tools to choose from.", param=PARAM)
        case _ if not tools:
            return None
    must = choice is not None and choice.type == "any"
    parallel = choice is None or not choice.disable_parallel_tool_use
    callable_tools = [_callable(tool) for tool in tools]
    return ToolUse(callable_tools, "required" if must else "auto", parallel=parallel)


def _callable(tool: CustomTool) -> dict[str, Any]:
    return function_tool(tool.name, tool.description, tool.input_schema, strict=tool.strict)
