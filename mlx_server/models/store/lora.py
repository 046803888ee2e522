"""LoRA adapters on disk: folders as mlx-lm writes them, each a variant of a base model.

Which folders there are, for which base, and what is wrong with one. The catalog names the variants;
applying an adapter is the engine's business.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_server.config import Settings

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
DEPTHS = (2, 3)
"""Levels below the adapters' folder: BASE/NAME, or ORG/BASE/NAME."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter folder, called `name`, for the model that `base` names."""

    base: str
    name: str
    folder: Path

    @property
    def fault(self) -> str | None:
        """Why it cannot be used, or None."""
        try:
            config = json.loads((self.folder / CONFIG).read_bytes())
        except FileNotFoundError:
            return f"it has no {CONFIG}"
        except (OSError, ValueError, RecursionError) as error:
            return f"its {CONFIG} cannot be read ({type(error).__name__})"
        if not isinstance(config, dict):
            return f"its {CONFIG} is no JSON object"
        return None if os.path.isfile(self.folder / WEIGHTS) else f"it has no {WEIGHTS}"

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return (self.folder / WEIGHTS).stat().st_size

    @property
    def created(self) -> int:
        """When it was made, in seconds since the epoch."""
        return int((self.folder / CONFIG).stat().st_mtime)


def find_adapters(settings: Settings) -> Iterator[LoraAdapter]:
    """Every adapter folder: those in the settings first, then those found by themselves."""
    for variant, folder in settings.adapters.items():
        base, _, name = variant.rpartition("@")
        yield LoraAdapter(base, name, folder.expanduser())
    root = settings.adapters_folder
    for place, folders, files in os.walk(root, followlinks=True):
        parts = Path(place).relative_to(root).parts
        if len(parts) in DEPTHS and files:
            yield LoraAdapter("/".join(parts[:-1]), parts[-1], Path(place))
        deeper = len(parts) < max(DEPTHS) and not (len(parts) in DEPTHS and files)
        folders[:] = sorted(name for name in folders if deeper and not name.startswith("."))
