"""The JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from mlx_server.errors import ModelLoadFailed

MAX_REASON = 500


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelLoadFailed."""
    return _read_json(path / "config.json")


def read_optional_config(path: Path) -> dict[str, Any]:
    """The model's generation_config.json, empty when there is none. Raises ModelLoadFailed."""
    file = path / "generation_config.json"
    return _read_json(file) if file.exists() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(
            f"{file.name} of {file.parent.name} could not be read: {one_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ModelLoadFailed(f"{file.name} of {file.parent.name} is not a JSON object.")
    return content


def one_line(error: Exception) -> str:
    """What went wrong, in one line that an answer can carry."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
