"""Model folders and hub caches as the store finds them, with weights that nobody loads."""

import json
from pathlib import Path

from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.sources import ModelSources

COMMIT = "a" * 40
OLDER = "b" * 40


def sources_in(home: Path, **options: object) -> ModelSources:
    """The folders that a server with this home has."""
    folders = {"models_folder": home / "models", "adapters_folder": home / "adapters"}
    return ModelSources(**folders | options)  # type: ignore[arg-type]


def make_model(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def make_snapshot(cache: Path, repo: str, commit: str, ref: str | None = "main") -> Path:
    storage = cache / f"models--{repo.replace('/', '--')}"
    if ref is not None:
        (storage / "refs").mkdir(parents=True, exist_ok=True)
        (storage / "refs" / ref).write_text(commit)
    return make_model(storage / "snapshots" / commit)


def ids(sources: ModelSources) -> list[str]:
    return [entry.id for entry in Catalog(sources).entries()]
