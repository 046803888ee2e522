"""OpenAI's wire format of what conversations consist of."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from mlx_server.schemas.objects import NonEmpty, RequestObject
from mlx_server.schemas.openai.messages import MAX_PIECES

TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
    "reasoning": (),
    "item_reference": ("id",),
}
"""Fields of the items that are understood, by type."""
HOSTED_TOOLS = (
    *("file_search", "web_search", "computer", "image_generation", "code_interpreter"),
    *("local_shell", "shell", "apply_patch", "mcp", "tool_search"),
)
PASSED_OVER = frozenset(
    {
        *(f"{tool}_call" for tool in HOSTED_TOOLS),
        *(f"{tool}_call_output" for tool in HOSTED_TOOLS),
        *("mcp_list_tools", "mcp_approval_request", "mcp_approval_response"),
        *("tool_search_output", "additional_tools", "configuration_update"),
        *("compaction_trigger", "program", "program_output"),
    }
)
"""Items of hosted tools, which another server wrote."""


class Part(RequestObject):
    """Only text is supported."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type not in TEXT_PARTS and self.type != "refusal":
            raise ValueError(
                f"content of type '{self.type[:40]}' is not supported: this server takes text only"
            )
        if self.said is None:
            field = "refusal" if self.type == "refusal" else "text"
            raise ValueError(f"content of type '{self.type}' must have a string `{field}`")
        return self

    @property
    def said(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


Parts = Annotated[list[Part], Field(fail_fast=True)]


class Item(RequestObject):
    """A message, call, call's output, thinking or reference; others are of hosted tools."""

    model_config = ConfigDict(
        json_schema_extra={"description": "By `type`; without one, a message"}
    )

    type: str = "message"
    id: NonEmpty | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    phase: str | None = None
    content: str | Parts | None = None
    call_id: NonEmpty | None = None
    name: NonEmpty | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | Parts | None = None
    summary: Parts | None = None
    encrypted_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind = data.get("type")
        if kind is None:
            kind = "item_reference" if set(data) == {"id"} else "message"
        if isinstance(kind, str) and kind in PASSED_OVER:
            # Their fields say other things.
            return {"type": kind}
        return {**data, "type": kind}

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.type in PASSED_OVER:
            return self
        if self.type not in NEEDED:
            raise ValueError(f"items of type '{self.type[:40]}' are not known")
        for field in NEEDED[self.type]:
            if getattr(self, field) is None:
                raise ValueError(f"an item of type '{self.type}' must have `{field}`")
        return self

    def texts(self, field: str) -> list[str]:
        told = getattr(self, field)
        if isinstance(told, str):
            return [told]
        return [part.said or "" for part in told or ()]


def _few_pieces(items: Any) -> Any:
    """Raises ValueError for too many to check one by one."""
    if not isinstance(items, list):
        return items
    lists = (
        item[name]
        for item in items[:MAX_PIECES]
        if isinstance(item, dict)
        for name in ("content", "output", "summary")
        if isinstance(item.get(name), list)
    )
    if len(items) > MAX_PIECES or len(items) + sum(map(len, lists)) > MAX_PIECES:
        raise ValueError(f"must have at most {MAX_PIECES} items and parts in all")
    return items


Items = Annotated[list[Item], Field(fail_fast=True), BeforeValidator(_few_pieces)]
