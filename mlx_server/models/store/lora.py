"""LoRA adapter folders, as mlx-lm writes them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_server.errors import ModelLoadFailed
from mlx_server.models.store.folder import is_text, read_object
from mlx_server.models.store.sources import ModelSources

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
DEPTHS = (2, 3)
"""BASE/NAME, or ORG/BASE/NAME."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`base` is the adapted model's id or alias."""

    base: str
    name: str
    folder: Path

    @property
    def fault(self) -> str | None:
        for name in (CONFIG, WEIGHTS):
            if not os.path.isfile(self.folder / name):
                return f"it has no {name}"
        try:
            read_object(self.folder / CONFIG)
        except ModelLoadFailed as error:
            return error.message.rstrip(".")
        return None

    @property
    def size(self) -> int:
        return (self.folder / WEIGHTS).stat().st_size

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        return int((self.folder / CONFIG).stat().st_mtime)


def find_adapters(sources: ModelSources) -> Iterator[LoraAdapter]:
    for variant, folder in sources.adapters.items():
        base, _, name = variant.rpartition("@")
        yield LoraAdapter(base, name, folder)
    root = sources.adapters_folder
    for place, folders, files in os.walk(root, followlinks=True):
        parts = Path(place).relative_to(root).parts
        is_adapter = len(parts) in DEPTHS and bool(files) and is_text(place)
        if is_adapter:
            yield LoraAdapter("/".join(parts[:-1]), parts[-1], Path(place))
        # A link may lead back up.
        deeper = len(parts) < max(DEPTHS) and not is_adapter
        folders[:] = sorted(name for name in folders if deeper and not name.startswith("."))
