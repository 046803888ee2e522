"""What a shell offers for a model's name. Silent where nothing can be read."""

from typing import TYPE_CHECKING

from mlx_server.cli.options import CommandError, load_settings
from mlx_server.errors import ServerError

if TYPE_CHECKING:
    from mlx_server.models.store.catalog import Catalog


def complete_model(incomplete: str) -> list[str]:
    """Models that can be served."""
    catalog = _catalog()
    ids = [entry.id for entry in catalog.entries()] if catalog else []
    return _beginning(ids, incomplete)


def complete_removable(incomplete: str) -> list[str]:
    """Those, and what cannot be served."""
    catalog = _catalog()
    ids = [*(entry.id for entry in catalog.entries()), *catalog.faults()] if catalog else []
    return _beginning(ids, incomplete)


def complete_fetchable(incomplete: str) -> list[str]:
    """Demo models and aliases: the hub is not asked."""
    from mlx_server.models.store.demo import PACKAGED

    catalog = _catalog()
    return _beginning([*PACKAGED, *(catalog.sources.aliases if catalog else ())], incomplete)


def _catalog() -> "Catalog | None":
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.sources import ModelSources

    try:
        return Catalog(ModelSources.of(load_settings(None)))
    except (CommandError, ServerError):
        return None


def _beginning(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
