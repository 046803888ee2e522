"""Which models there are and where: local folders, the Hugging Face cache, aliases, the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_server.config import Settings


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that can be served.

    `path` is its MLX folder, None as long as it must be pulled first. `size` is bytes on disk,
    `created` seconds since the epoch. `aliases` are its other names.
    """

    id: str
    path: Path | None
    source: Literal["folder", "hub", "package", "command line"]
    aliases: tuple[str, ...] = ()
    size: int = 0
    created: int = 0
    model_type: str | None = None
    context_length: int | None = None


class Catalog:
    """Looks models up by id, alias or, for the command line alone, path. Methods read the disk."""

    def __init__(self, settings: Settings) -> None: ...

    def entries(self) -> list[ModelEntry]:
        """Every model that can be served now, sorted by id; each model once."""

    def find(self, model_id: str) -> ModelEntry:
        """The entry that `model_id` names, by id or alias. Never treats it as a path.

        Raises ModelNotFound, naming close matches, when there is none.
        """

    def add(self, name: str) -> ModelEntry:
        """Resolve what the operator wrote: id, alias, or a path (folder or GGUF file).

        A path is from now on found under its folder's name and under the text given.
        """
