"""Reads sentence-transformers' files: `modules.json` lists a text's modules, each a folder with
`config.json`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_server.engine.protocol import ENCODERS, Embedding, PoolingMode
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.store.folder import model_config, read_json

MODULES = "modules.json"
LENGTHS = "sentence_*_config.json"
SCORING = "ForSequenceClassification"
HARMLESS = frozenset({"Transformer", "Dropout"})
"""Without effect here."""
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
"""In the order of their vectors."""


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """`longest` is in tokens."""

    embedding: Embedding
    longest: int | None


def is_embedding_model(folder: Path, config: dict[str, Any]) -> bool:
    return config.get("model_type") in ENCODERS or os.path.isfile(folder / MODULES)


def is_cross_encoder(config: dict[str, Any]) -> bool:
    """Whether it judges pairs of texts with one number."""
    kinds, labels = config.get("architectures"), config.get("id2label")
    if config.get("model_type") not in ENCODERS or not isinstance(kinds, list):
        return False
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels")
    return count == 1 and any(str(kind).endswith(SCORING) for kind in kinds)


def read_embedding(folder: Path) -> EmbeddingFiles:
    """Raises ModelLoadFailed for unsupported models. Without `modules.json`: the mean over tokens,
    normalized.
    """
    if is_cross_encoder(model_config(folder) or {}):
        return EmbeddingFiles(Embedding([], normalize=False, scores=True), max_seq_length(folder))
    if not (folder / MODULES).is_file():
        return EmbeddingFiles(Embedding(["mean"], normalize=True), max_seq_length(folder))
    pooling: list[PoolingMode] = []
    normalize = False
    for kind, path in _modules(folder):
        if kind == "Pooling" and not pooling:
            pooling = _pooling(read_json(folder / path / "config.json"))
        elif kind == "Normalize" and pooling:
            normalize = True
        elif kind not in HARMLESS:
            raise ModelLoadFailed(f"its {MODULES} has a part that is not supported here: {kind}")
    if not pooling:
        raise ModelLoadFailed(f"its {MODULES} names no way of pooling")
    return EmbeddingFiles(Embedding(pooling, normalize), max_seq_length(folder))


def max_seq_length(folder: Path) -> int | None:
    """In tokens. Raises ModelLoadFailed."""
    for file in sorted(folder.glob(LENGTHS)):
        config = read_json(file)
        longest = config.get("max_seq_length") if isinstance(config, dict) else None
        if type(longest) is int and longest > 0:
            return longest
    return None


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    modules = read_json(folder / MODULES)
    if not isinstance(modules, list):
        raise ModelLoadFailed(f"its {MODULES} is not a list")
    for module in modules:
        kind, path = (module.get(k) if isinstance(module, dict) else None for k in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(path, str) or ".." in Path(path).parts:
            raise ModelLoadFailed(f"its {MODULES} has an entry without `type` and `path`")
        yield kind.rpartition(".")[2], path.lstrip("/")


def _pooling(config: Any) -> list[PoolingMode]:
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
