"""Which models make vectors of texts, and how, as their folders tell.

The files are those that sentence-transformers writes: `modules.json` lists what a text goes
through, each part has a folder with a `config.json`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_server.engine.protocol import ENCODERS, Embedding, PoolingMode
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.store.folder import one_line

MODULES = "modules.json"
LENGTHS = "sentence_*_config.json"
HARMLESS = frozenset({"Transformer", "Dropout"})
"""Parts that change nothing here."""
MODES: dict[str, PoolingMode] = {
    "cls": "cls",
    "cls_token": "cls",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "weightedmean_tokens": "weighted_mean",
    "lasttoken": "last",
}
"""Ways of pooling by their names in a configuration, in the order in which they are put."""


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """How vectors are made, and tokens that a text may have if the files limit them."""

    embedding: Embedding
    longest: int | None


def makes_vectors(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the model in `folder` makes vectors, rather than to generate."""
    return config.get("model_type") in ENCODERS or os.path.isfile(folder / MODULES)


def read_embedding(folder: Path) -> EmbeddingFiles:
    """What the files of an embedding model say. Raises ModelLoadFailed for what is not supported.

    An encoder without them takes the mean of its tokens, scaled to length 1.
    """
    if not (folder / MODULES).is_file():
        return EmbeddingFiles(Embedding(["mean"], normalize=True), longest_text(folder))
    pooling: list[PoolingMode] = []
    normalize = False
    for kind, path in _modules(folder):
        if kind == "Pooling" and not pooling:
            pooling = _pooling(_read(folder / path / "config.json"))
        elif kind == "Normalize" and pooling:
            normalize = True
        elif kind not in HARMLESS:
            raise ModelLoadFailed(f"its {MODULES} has a part that is not supported here: {kind}")
    if not pooling:
        raise ModelLoadFailed(f"its {MODULES} names no way of pooling")
    return EmbeddingFiles(Embedding(pooling, normalize), longest_text(folder))


def longest_text(folder: Path) -> int | None:
    """Tokens that a text may have, if the files limit them. Raises ModelLoadFailed."""
    for file in sorted(folder.glob(LENGTHS)):
        config = _read(file)
        longest = config.get("max_seq_length") if isinstance(config, dict) else None
        if type(longest) is int and longest > 0:
            return longest
    return None


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """The kind and the folder of each part a text goes through, in order."""
    modules = _read(folder / MODULES)
    if not isinstance(modules, list):
        raise ModelLoadFailed(f"its {MODULES} is not a list")
    for module in modules:
        kind, path = (module.get(k) if isinstance(module, dict) else None for k in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(path, str) or ".." in Path(path).parts:
            raise ModelLoadFailed(f"its {MODULES} has an entry without `type` and `path`")
        yield kind.rpartition(".")[2], path.lstrip("/")


def _pooling(config: Any) -> list[PoolingMode]:
    """The ways of pooling that are switched on, or named."""
    if not isinstance(config, dict):
        raise ModelLoadFailed("the configuration of its pooling is not a JSON object")
    named = config.get("pooling_mode")
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list):
        prefix = "pooling_mode_"
        names = [key.removeprefix(prefix) for key, on in config.items() if on is True]
        names = [name for name in names if f"{prefix}{name}" in config]
    if strange := [name for name in names if name not in MODES]:
        raise ModelLoadFailed(f"its way of pooling is not supported here: {strange[0]}")
    return list(dict.fromkeys(mode for name, mode in MODES.items() if name in names))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadFailed(f"{file.name} could not be read: {one_line(error)}") from error
