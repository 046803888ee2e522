"""What a model's files say it can do."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mlx_server.errors import ModelLoadFailed
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.chat_template import FILES, read_template
from mlx_server.models.text.styles.thinking import KNOWN

TOKENIZER = "tokenizer.json"
DECODER = re.compile(rb'"decoder"\s*:\s*(?:null|\{\s*"type"\s*:\s*"(\w+)")')
DECODER_WITHIN = 1 << 22
"""Bytes of tokenizer.json, whose vocabulary comes last."""
UNBOUND = (None, b"BPEDecoder", b"CTC", b"WordPiece")
"""Decoders that grammars cannot follow token by token."""
TOOLS = re.compile(r"\btools\b")
THINKING = ("<|channel|>analysis", *(marks.start for marks in KNOWN))


@dataclass(frozen=True, slots=True)
class FileCapabilities:
    """`native_tools`: the template renders tools; others get a tool prompt."""

    chat: bool
    tools: bool
    native_tools: bool
    reasoning: bool
    structured_output: bool
    embeddings: bool
    rerank: bool


def read_capabilities(entry: ModelEntry) -> FileCapabilities | None:
    """None for unreadable files."""
    if entry.embeds:
        return FileCapabilities(
            *(False, False, False, False, False), embeddings=not entry.reranks, rerank=True
        )
    if entry.path is None:
        return None
    try:
        template = chat_template(entry.path)
        bound = _can_be_bound(entry.path, _mtime_ns(entry.path / TOKENIZER))
    except (OSError, ModelLoadFailed):
        return None
    return FileCapabilities(
        chat=bool(template),
        tools=bool(template),
        native_tools=TOOLS.search(template) is not None,
        reasoning=any(mark in template for mark in THINKING),
        structured_output=bound,
        embeddings=False,
        rerank=False,
    )


def chat_template(path: Path) -> str:
    """Empty without one. Raises OSError, ModelLoadFailed."""
    return _template(path, tuple(_mtime_ns(path / name) for name in FILES))


def _mtime_ns(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=256)
def _template(path: Path, mtimes: tuple[int, ...]) -> str:
    """`mtimes` invalidates the cache."""
    for name in FILES:
        if found := read_template(path / name):
            return found if isinstance(found, str) else "\n".join(found.values())
    return ""


@lru_cache(maxsize=256)
def _can_be_bound(path: Path, mtime_ns: int) -> bool:
    """`mtime_ns` invalidates the cache."""
    if not mtime_ns:  # it will be made from other files, with a decoder that serves
        return True
    with (path / TOKENIZER).open("rb") as file:
        found = DECODER.search(file.read(DECODER_WITHIN))
    return found is None or found[1] not in UNBOUND
