"""generation_config.json: the tokens that end an answer, and the sampling that suits the model."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_server.dimensions import text_part
from mlx_server.errors import ModelLoadFailed
from mlx_server.events import event
from mlx_server.models.store.folder import read_config, read_object

FILE = "generation_config.json"
LEAST_TEMPERATURE = 2.0**-126
"""The smallest normal float32; devices may flush smaller ones to 0."""
BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (-1.0, 2.0**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 2.0),
}
"""As of a request's settings; but a `top_p` of 0 recommends nothing."""

log = logging.getLogger("mlx_server.store")


def eos_token_ids(folder: Path) -> frozenset[int]:
    """From both configs. Raises ModelLoadFailed."""
    config = read_config(folder)
    ids: list[Any] = []
    for settings in (config, text_part(config), _generation_config(folder)):
        named = settings.get("eos_token_id")
        ids += named if isinstance(named, list) else [named]
    return frozenset(i for i in ids if type(i) is int)


def own_sampling(folder: Path) -> dict[str, float]:
    """What the model's makers recommend, by `Sampling`'s names; without what is no setting."""
    config = _generation_config(folder)
    given = {name: config[name] for name in BOUNDS if config.get(name) is not None}
    usable = {name: value for name, value in given.items() if _is_setting(name, value)}
    if strange := sorted(given.keys() - usable.keys()):
        log.warning(event("sampling_ignored", model=folder.name, names=",".join(strange)))
    if "top_k" in usable:
        usable["top_k"] = max(0, int(usable["top_k"]))
    if usable.get("temperature", 1.0) < LEAST_TEMPERATURE:
        usable["temperature"] = 0.0
    return usable


def _is_setting(name: str, value: Any) -> bool:
    low, high = BOUNDS[name]
    kinds = (int,) if name == "top_k" else (int, float)
    return type(value) in kinds and low <= value <= high


def _generation_config(folder: Path) -> Mapping[str, Any]:
    file = folder / FILE
    try:
        return _read(file, file.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=256)
def _read(file: Path, mtime_ns: int) -> Mapping[str, Any]:
    """{} for a broken file, without which a model still answers."""
    try:
        return read_object(file)
    except ModelLoadFailed as error:
        log.warning(event("generation_config_ignored", reason=error.message))
        return {}
