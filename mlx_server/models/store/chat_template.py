"""Where a model folder has its chat template."""

from pathlib import Path
from typing import Any

from mlx_server.errors import ModelLoadFailed, reason
from mlx_server.models.store.folder import read_json

OF_PROCESSOR = "chat_template.json"
"""Where multimodal repositories had it once."""
FILES = ("chat_template.jinja", "tokenizer_config.json", OF_PROCESSOR)
"""The first one with a template counts."""

PROGRAMS = {"deepseek_v32": "{# tools <think> #}"}
"""Templates that mlx-lm has as programs, by `chat_template_type`, and what they know."""

Template = str | dict[str, str]
"""Several have names, such as `tool_use`."""


def read_template(file: Path) -> Template | None:
    """Raises ModelLoadFailed."""
    if not file.is_file():
        return None
    if file.suffix == ".jinja":
        return _text_of(file)
    content = read_json(file)
    if not isinstance(content, dict):
        return None
    program = content.get("chat_template_type")
    known = PROGRAMS.get(program) if isinstance(program, str) else None
    return known or _template(content.get("chat_template"))


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadFailed(f"{file.name} could not be read: {reason(error)}") from error


def _template(value: Any) -> Template | None:
    if isinstance(value, str):
        return value
    named = value if isinstance(value, list) else []
    pairs = ((one.get("name"), one.get("template")) for one in named if isinstance(one, dict))
    return {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)} or None
