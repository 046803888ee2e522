"""A model's adapter: by `model_type`, else by name, else the generic one."""

from pathlib import Path
from typing import Any

from mlx_server.models.store.folder import read_config
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.gemma import GemmaAdapter
from mlx_server.models.text.adapters.generic import GenericAdapter
from mlx_server.models.text.adapters.gpt_oss import GptOssAdapter
from mlx_server.models.text.adapters.llama import LlamaAdapter
from mlx_server.models.text.adapters.mistral import MistralAdapter
from mlx_server.models.text.adapters.phi import PhiAdapter
from mlx_server.models.text.adapters.qwen import QwenAdapter

FAMILIES: tuple[type[Adapter], ...] = (
    LlamaAdapter,
    QwenAdapter,
    MistralAdapter,
    GemmaAdapter,
    PhiAdapter,
    GptOssAdapter,
)


def load_adapter(path: Path, name: str, trust_remote_code: bool = False) -> Adapter:
    """Blocks. Raises ModelLoadFailed."""
    return find_family(read_config(path), name)(path, trust_remote_code)


def find_family(config: dict[str, Any], name: str) -> type[Adapter]:
    model_type = str(config.get("model_type") or "").lower()
    short_name = name.rstrip("/").rsplit("/", 1)[-1].lower()
    for family in FAMILIES:
        if family.model_types.search(model_type):
            return family
    for family in FAMILIES:
        if family.names.search(short_name):
            return family
    return GenericAdapter
