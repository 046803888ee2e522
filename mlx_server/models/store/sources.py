"""Where models are, and their other names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_server.config import Settings


@dataclass(frozen=True, slots=True)
class ModelSources:
    """`models_folder` is ours, `model_dirs` the user's; `adapters` are by `base@name`. GGUF files
    are converted to `gguf_bits`, or to what they have.
    """

    models_folder: Path
    adapters_folder: Path
    model_dirs: Sequence[Path] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    gguf_bits: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> "ModelSources":
        return cls(
            models_folder=settings.models_folder,
            adapters_folder=settings.adapters_folder,
            model_dirs=settings.model_dirs,
            aliases=settings.aliases,
            adapters=settings.adapters,
            gguf_bits=settings.gguf_bits,
        )
