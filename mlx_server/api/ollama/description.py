"""A model in Ollama's words, from its files. Blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_server.api.ollama.answers import moment
from mlx_server.dimensions import (
    HEADS,
    INNER_WIDTH,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Names,
    number,
    text_part,
)
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.pool.footprint import parameter_count
from mlx_server.models.store.capabilities import chat_template, read_capabilities
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.folder import model_config
from mlx_server.models.store.generation import own_sampling
from mlx_server.schemas.ollama.models import Details

SIZES: Mapping[str, Names] = {
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "feed_forward_length": INNER_WIDTH,
    "vocab_size": VOCABULARY,
}
"""By their names in `model_info`."""
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Description:
    entry: ModelEntry
    longest: int | None
    """Context that the settings allow for, in tokens."""

    @property
    def modified_at(self) -> str:
        return moment(datetime.fromtimestamp(self.entry.created, UTC))

    @property
    def digest(self) -> str:
        """Changes with the model, and is no hash of its files."""
        entry = self.entry
        return sha256(f"{entry.id}\n{entry.size}\n{entry.created}".encode()).hexdigest()

    @property
    def context_length(self) -> int | None:
        return self.entry.context_within(self.longest)

    def capabilities(self) -> list[str]:
        known = read_capabilities(self.entry)
        if known is None:
            return []
        if known.embeddings:
            return ["embedding"]
        more = {"tools": known.tools, "thinking": known.reasoning}
        return ["completion", *(name for name, has in more.items() if has)]

    def details(self) -> Details:
        family = self.entry.model_type or ""
        return Details(
            parent_model="",
            format="safetensors",
            family=family,
            families=[family],
            parameter_size=human(self._parameters()),
            quantization_level=quantization(self._config()),
        )

    def model_info(self) -> dict[str, Any]:
        family, config = self.entry.model_type or "unknown", self._config()
        sizes = {name: number(config, keys) for name, keys in SIZES.items()}
        sizes["context_length"] = self.context_length or 0
        return {
            "general.architecture": family,
            "general.basename": self.entry.id,
            "general.parameter_count": self._parameters(),
        } | {f"{family}.{name}": size for name, size in sizes.items() if size}

    def template(self) -> str:
        try:
            return chat_template(self.entry.path) if self.entry.path else ""
        except (OSError, ModelLoadFailed):
            return ""

    def parameters(self) -> dict[str, float]:
        """What a request that says nothing is sampled with, by Ollama's names."""
        own = own_sampling(self.entry.path) if self.entry.path else {}
        return {name.replace("repetition", "repeat"): value for name, value in own.items()}

    def _config(self) -> dict[str, Any]:
        return (model_config(self.entry.path) if self.entry.path else None) or {}

    def _parameters(self) -> int:
        entry = self.entry
        return _counted(entry.path, entry.size, entry.created) if entry.path else 0


@lru_cache(maxsize=256)
def _counted(path: Path, size: int, created: int) -> int:
    """0 for damaged files. `size` and `created` invalidate the cache."""
    try:
        return parameter_count(path)
    except ModelLoadFailed:
        return 0


def human(count: int) -> str:
    for unit, letter in UNITS:
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def quantization(config: Mapping[str, Any]) -> str:
    settings = config.get("quantization")
    if isinstance(settings, dict) and isinstance(bits := settings.get("bits"), int):
        mode = settings.get("mode", "affine")
        return f"int{bits}" if mode == "affine" else str(mode)
    part = text_part(config)
    dtype = part.get("torch_dtype") or part.get("dtype") or config.get("torch_dtype")
    return DTYPES.get(str(dtype), "unknown")
