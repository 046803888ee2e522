"""The texts of blocks."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from mlx_server.schemas.anthropic.blocks import (
    CompactionBlock,
    DocumentBlock,
    SearchResultBlock,
    TextBlock,
    ToolReference,
)

Definition = Callable[[str], dict[str, Any] | None]
"""What the template would show of a tool that it does not show, by name."""


def joined(texts: Iterable[str]) -> str:
    return "\n".join(texts)


def text_of(block: object, definition: Definition = lambda name: None) -> str | None:
    """None for a block without a text."""
    match block:
        case TextBlock(text=text):
            return text
        case SearchResultBlock():
            texts = (part.text for part in block.content)
            return joined([f"{block.title} ({block.source})", *texts])
        case DocumentBlock():
            return joined(filter(None, (block.title, block.context, _document(block))))
        case CompactionBlock():
            return block.content
        case ToolReference():
            tool = definition(block.tool_name)
            return json.dumps(tool, ensure_ascii=False) if tool else block.tool_name
    return None


def _document(block: DocumentBlock) -> str:
    source = block.source
    if source.type == "text":
        return source.data
    return source.content if isinstance(source.content, str) else plain(source.content)


def plain(content: str | Iterable[object], definition: Definition = lambda name: None) -> str:
    if isinstance(content, str):
        return content
    texts = (text_of(block, definition) for block in content)
    return joined(text for text in texts if text is not None)
