"""Anthropic's wire format of what messages hold."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_server.schemas.objects import NonEmpty, RequestObject

TEXT_ONLY = ("image", "container_upload", "browser_state")
"""Known blocks without a text."""


CacheControl = dict[str, Any]
"""Changes nothing but how usage is told, so whatever it says is taken."""


class Block(RequestObject):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str


class SearchResultBlock(Block):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]


class TextSource(RequestObject):
    type: Literal["text"]
    data: str


class ContentSource(RequestObject):
    type: Literal["content"]
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)]


def _of(*kinds: str) -> BeforeValidator:
    """Refuses blocks of other types in words, and pictures as such."""

    def check(block: Any) -> Any:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind in kinds:
            return block
        if kind in TEXT_ONLY or kind in ("base64", "url", "file"):
            raise ValueError(
                f"'{kind}' is not supported: this server takes text only, no pictures and no files"
            )
        raise ValueError(f"there is no '{kind[:40]}' here, but {', '.join(kinds)}")

    return BeforeValidator(check)


Source = Annotated[
    Annotated[TextSource | ContentSource, Field(discriminator="type")], _of("text", "content")
]


class DocumentBlock(Block):
    type: Literal["document"]
    source: Source
    title: str | None = None
    context: str | None = None


class ToolReference(Block):
    type: Literal["tool_reference"]
    tool_name: str


Result = Annotated[
    Annotated[
        TextBlock | SearchResultBlock | DocumentBlock | ToolReference, Field(discriminator="type")
    ],
    _of("text", "search_result", "document", "tool_reference"),
]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: str | Annotated[list[Result], Field(fail_fast=True)] = ""
    is_error: bool = False


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: dict[str, Any]


class ThinkingBlock(RequestObject):
    """`signature` may hold the thinking that `thinking` leaves out."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(RequestObject):
    type: Literal["redacted_thinking"]
    data: str


class CompactionBlock(Block):
    """A summary of what came before."""

    type: Literal["compaction"]
    content: str | None = None


ForeignKind = Literal[
    "advisor_tool_result",
    "bash_code_execution_tool_result",
    "code_execution_tool_result",
    "connector_text",
    "fallback",
    "mcp_tool_listing",
    "mcp_tool_result",
    "mcp_tool_use",
    "server_tool_use",
    "text_editor_code_execution_tool_result",
    "tool_addition",
    "tool_removal",
    "tool_search_tool_result",
    "web_fetch_tool_result",
    "web_search_tool_result",
]


class ForeignBlock(RequestObject):
    """What Anthropic's own servers did in a conversation that goes on here; passed over."""

    type: ForeignKind


FOREIGN: tuple[str, ...] = ForeignKind.__args__  # type: ignore[attr-defined]

UserBlock = Annotated[
    Annotated[
        TextBlock
        | ToolResultBlock
        | DocumentBlock
        | SearchResultBlock
        | CompactionBlock
        | ForeignBlock,
        Field(discriminator="type"),
    ],
    _of("text", "tool_result", "document", "search_result", "compaction", *FOREIGN),
]
AssistantBlock = Annotated[
    Annotated[
        TextBlock
        | ToolUseBlock
        | ThinkingBlock
        | RedactedThinkingBlock
        | CompactionBlock
        | ForeignBlock,
        Field(discriminator="type"),
    ],
    _of("text", "tool_use", "thinking", "redacted_thinking", "compaction", *FOREIGN),
]
SystemBlock = Annotated[
    Annotated[TextBlock | ForeignBlock, Field(discriminator="type")], _of("text", *FOREIGN)
]
