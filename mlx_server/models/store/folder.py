"""A model folder's JSON files and completeness."""

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_server.errors import ModelLoadFailed, reason
from mlx_server.events import event
from mlx_server.models.store.families import family_fault

PARTIAL = ".partial"
"""Suffix of an incomplete folder, which is never served."""
WEIGHTS = "model*.safetensors"
WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"
SHARD = re.compile(r"(?P<stem>model.*)-[0-9]{5}-of-(?P<count>[0-9]{5})\.safetensors")
MOST_SHARDS = 1000
MAX_REASON = 500

log = logging.getLogger("mlx_server.store")


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
    config = model_config(folder)
    if config is None:
        return "it has no readable config.json with a model_type"
    if fault := family_fault(config):
        return fault
    try:
        return _weights_fault(folder)
    except (OSError, ModelLoadFailed) as error:
        return f"its weights cannot be read ({reason(error)})"


def _weights_fault(folder: Path) -> str | None:
    """Raises OSError, ModelLoadFailed."""
    files = {file.name for file in folder.glob(WEIGHTS) if file.is_file()}
    index = folder / INDEX
    if index.is_file():
        named = _shards(index)
        missing = [shard for shard in named if not (folder / shard).is_file()]
        if len(missing) == len(named) and WHOLE in files:
            _warn_of_index(index)
        elif missing:
            return f"it lacks {_some(missing)}, which its {INDEX} names"
    elif missing := sorted(_counted(files) - files):
        return f"it lacks {_some(missing)}"
    return None if files else f"it has no {WEIGHTS} file"


def _counted(files: Iterable[str]) -> set[str]:
    """All names of the series that some of `files` are of."""
    series = (match for file in files if (match := SHARD.fullmatch(file)))
    return {
        f"{match['stem']}-{number:05}-of-{match['count']}.safetensors"
        for match in series
        for number in range(1, min(int(match["count"]), MOST_SHARDS) + 1)
    }


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@lru_cache(maxsize=256)
def _warn_of_index(index: Path) -> None:
    """Once."""
    log.warning(event("stale_index_ignored", model=index.parent.name, used=WHOLE))


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
    """Complete and visible ones, with names of text; none if `parent` is unreadable."""
    try:
        # os.path.isdir is False, where Path.is_dir raises, for a link into a closed folder.
        return sorted(
            child
            for child in parent.iterdir()
            if not child.name.startswith(".")
            and not child.name.endswith(PARTIAL)
            and os.path.isdir(child)
            and is_text(str(child))
        )
    except OSError:
        return []


@lru_cache(maxsize=4096)
def is_text(path: str) -> bool:
    """False for names that are no UTF-8: no request could spell them."""
    try:
        path.encode()
    except UnicodeEncodeError:
        log.warning(event("folder_passed_over", path=path, reason="its name is no UTF-8"))
        return False
    return True
