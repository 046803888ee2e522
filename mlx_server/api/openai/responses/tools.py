"""Tools of Responses in chat completions' form, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.responses.tools import (
    HOSTED,
    Allowed,
    Chosen,
    Custom,
    Function,
    Hosted,
    Namespace,
    Tool,
    ToolChoice,
)

BETWEEN = "__"
"""Joins a namespace and a tool's name, for the model."""


@dataclass(frozen=True, slots=True)
class Named:
    """A tool's own name, and whether its input is free text."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(slots=True)
class ToolBox:
    """`tools` as chat completions take them; `named` by what they are called there."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    named: dict[str, Named] = field(default_factory=dict)

    @classmethod
    def of(cls, tools: Sequence[Tool]) -> "ToolBox":
        """Raises BadRequest for two tools of one name."""
        box = cls()
        for tool in tools:
            if isinstance(tool, Namespace):
                for one in tool.tools:
                    box._add(one, tool)
            elif not isinstance(tool, Hosted):
                box._add(tool, None)
        return box

    def _add(self, tool: Function | Custom, group: Namespace | None) -> None:
        name = flat(tool.name, group.name if group else None)
        if name in self.named:
            raise BadRequest(f"There are two tools of the name '{name}'.", param="tools")
        about = [group.description] if group and group.description else []
        described = "\n".join([*about, tool.description or ""]).strip()
        told: dict[str, Any] = {"name": name}
        if described:
            told["description"] = described
        if isinstance(tool, Custom):
            form: dict[str, Any] = {"type": tool.format.type}
            if tool.format.type == "grammar":
                form["grammar"] = tool.format.model_dump(include={"syntax", "definition"})
            self.tools.append({"type": "custom", "custom": told | {"format": form}})
        else:
            told |= {"parameters": tool.parameters, "strict": tool.strict}
            self.tools.append({"type": "function", "function": told})
        self.named[name] = Named(tool.name, group.name if group else None, isinstance(tool, Custom))

    def choice(self, asked: ToolChoice) -> str | dict[str, Any]:
        """Raises BadRequest."""
        if isinstance(asked, Allowed):
            chosen = [self._chosen(one) for one in asked.tools if one.type not in HOSTED]
            if not chosen:
                return "none"
            allowed = {"mode": asked.mode, "tools": chosen}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        if isinstance(asked, Chosen):
            return self._chosen(asked)
        if asked == "required" and not self.tools:
            raise BadRequest("There are no tools to choose from.", param="tool_choice")
        return asked if self.tools else "none"

    def _chosen(self, one: Chosen) -> dict[str, Any]:
        if one.type not in ("function", "custom"):
            raise BadRequest(
                f"This server has no tool of type '{one.type[:40]}'.", param="tool_choice"
            )
        name = flat(one.name or "", one.namespace)
        if name not in self.named:
            raise BadRequest(f"There is no tool '{name[:64]}' to choose.", param="tool_choice")
        kind = "custom" if self.named[name].custom else "function"
        return {"type": kind, kind: {"name": name}}


def flat(name: str, namespace: str | None) -> str:
    return f"{namespace}{BETWEEN}{name}" if namespace else name
