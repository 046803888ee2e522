"""A model folder's JSON files and completeness."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_server.errors import ModelLoadFailed

PARTIAL = ".partial"
"""Suffix of an incomplete folder, which is never served."""
WEIGHTS = "model*.safetensors"
INDEX = "model.safetensors.index.json"
MAX_REASON = 500


def read_config(path: Path) -> dict[str, Any]:
    """Raises ModelLoadFailed."""
    return read_object(path / "config.json")


def read_object(file: Path) -> dict[str, Any]:
    """Raises ModelLoadFailed."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise ModelLoadFailed(f"{file.name} of {file.parent.name} is not a JSON object.")
    return content


def read_json(file: Path) -> Any:
    """Raises ModelLoadFailed."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadFailed(
            f"{file.name} of {file.parent.name} could not be read: {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def model_config(folder: Path) -> dict[str, Any] | None:
    try:
        config = read_config(folder)
    except ModelLoadFailed:
        return None
    return config if isinstance(config.get("model_type"), str) else None


def folder_fault(folder: Path) -> str | None:
    """Why it cannot be served; None if it can."""
    if folder.name.endswith(PARTIAL):
        return "it is an unfinished download"
    if model_config(folder) is None:
        return "it has no readable config.json with a model_type"
    index = folder / INDEX
    try:
        if index.is_file():
            missing = [shard for shard in _shards(index) if not (folder / shard).is_file()]
            return f"it lacks {', '.join(missing[:3])}" if missing else None
        if not any(file.is_file() for file in folder.glob(WEIGHTS)):
            return f"it has no {WEIGHTS} file"
    except (OSError, ModelLoadFailed) as error:
        return f"its weights cannot be read ({error})"
    return None


def _shards(index: Path) -> tuple[str, ...]:
    return _read_shards(index, index.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_shards(index: Path, mtime_ns: int) -> tuple[str, ...]:
    """`mtime_ns` invalidates the cache."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelLoadFailed(f"{INDEX} has no weight_map")
    return tuple(sorted(set(shards.values())))


def subfolders(parent: Path) -> list[Path]:
    """Complete and visible ones; none if `parent` is unreadable."""
    try:
        # os.path.isdir is False, where Path.is_dir raises, for a link into a closed folder.
        return sorted(
            child
            for child in parent.iterdir()
            if not child.name.startswith(".")
            and not child.name.endswith(PARTIAL)
            and os.path.isdir(child)
        )
    except OSError:
        return []
