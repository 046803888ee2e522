"""What a model's files say it can do."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mlx_server.errors import ModelLoadFailed
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.folder import read_json

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""The first one with a template counts."""
TOOLS = re.compile(r"\btools\b")
THINKING = (
    "<think>",
    "<longcat_think>",
    "<|think:start|>",
    "<|channel>thought",
    "<|channel|>analysis",
    "[THINK]",
)


@dataclass(frozen=True, slots=True)
class FileCapabilities:
    """`native_tools`: the template renders tools; others get a tool prompt."""

    chat: bool
    tools: bool
    native_tools: bool
    reasoning: bool
    structured_output: bool
    embeddings: bool


def read_capabilities(entry: ModelEntry) -> FileCapabilities | None:
    """None for unreadable files."""
    if entry.embeds:
        return FileCapabilities(False, False, False, False, False, embeddings=True)
    if entry.path is None:
        return None
    try:
        mtimes = tuple(_mtime_ns(entry.path / name) for name in TEMPLATE_FILES)
        template = _template(entry.path, mtimes)
    except (OSError, UnicodeDecodeError, ModelLoadFailed):
        return None
    return FileCapabilities(
        chat=bool(template),
        tools=bool(template),
        native_tools=TOOLS.search(template) is not None,
        reasoning=any(mark in template for mark in THINKING),
        structured_output=True,
        embeddings=False,
    )


def _mtime_ns(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=256)
def _template(path: Path, mtimes: tuple[int, ...]) -> str:
    """`mtimes` invalidates the cache."""
    return next(filter(None, (_template_in(path / name) for name in TEMPLATE_FILES)), "")


def _template_in(file: Path) -> str:
    if not file.is_file():
        return ""
    if file.suffix == ".jinja":
        return file.read_text(encoding="utf-8")
    content = read_json(file)
    template = (content.get("chat_template") if isinstance(content, dict) else None) or ""
    return template if isinstance(template, str) else json.dumps(template)
