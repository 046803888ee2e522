"""What a model can be asked for, as far as its files tell without its being loaded."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_server.models.store.catalog import ModelEntry

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a chat template stands, the first that has one."""
TOOLS = re.compile(r"\btools\b")
THINKING = ("<think>", "<longcat_think>", "<|think:start|>", "<|channel>thought", "[THINK]")
"""What opens thinking, in the templates of models that think."""


@dataclass(frozen=True, slots=True)
class FileCapabilities:
    """`native_tools` says that the model's own template knows tools; others are told of them."""

    chat: bool
    tools: bool
    native_tools: bool
    reasoning: bool
    structured_output: bool
    embeddings: bool


def read_capabilities(entry: ModelEntry) -> FileCapabilities | None:
    """What a model's files tell; None when there are none or they cannot be read."""
    if entry.embeds:
        return FileCapabilities(False, False, False, False, False, embeddings=True)
    if entry.path is None:
        return None
    try:
        stamps = tuple(_stamp(entry.path / name) for name in TEMPLATE_FILES)
        template = _template(entry.path, stamps)
    except (OSError, ValueError, RecursionError):
        return None
    return FileCapabilities(
        chat=bool(template),
        tools=bool(template),
        native_tools=TOOLS.search(template) is not None,
        reasoning=any(mark in template for mark in THINKING),
        structured_output=True,
        embeddings=False,
    )


def _stamp(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=256)
def _template(path: Path, stamps: tuple[int, ...]) -> str:
    """The chat template in `path`, empty if it has none; `stamps` make changed files others."""
    return next(filter(None, (_template_in(path / name) for name in TEMPLATE_FILES)), "")


def _template_in(file: Path) -> str:
    """The chat template in a file, or all of them if there are several; empty if there is none."""
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jinja":
        return text
    content: Any = json.loads(text)
    template = (content.get("chat_template") if isinstance(content, dict) else None) or ""
    return template if isinstance(template, str) else json.dumps(template)
