"""`list` and `rm`: models on this machine's disk."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_server.cli.completing import complete_removable
from mlx_server.cli.options import ConfigOption, JsonOption, gigabytes, load_settings, print_json
from mlx_server.cli.tables import Column, table
from mlx_server.errors import BadRequest, reason

if TYPE_CHECKING:
    from mlx_server.models.store.catalog import Catalog, ModelEntry
    from mlx_server.models.store.removal import Removal


def list_models(as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show the models that can be served now, and why others cannot."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.demo import DEMO
    from mlx_server.models.store.sources import ModelSources

    catalog = Catalog(ModelSources.of(load_settings(config)))
    entries = catalog.entries()
    if as_json:
        broken = [{"id": name, "reason": why} for name, why in catalog.faults().items()]
        print_json({"models": [_facts(entry) for entry in entries], "broken": broken})
        return
    _tell_faults(catalog)
    if entries:
        _print_table(entries)
    else:
        print(f"No models yet. Try `mlx-server pull {DEMO}`.")


def _facts(entry: "ModelEntry") -> dict[str, Any]:
    return {
        "id": entry.id,
        "aliases": entry.aliases,
        "source": entry.source,
        "path": entry.path,
        "size": entry.size,
        "model_type": entry.model_type,
        "context_length": entry.context_length,
        "embeds": entry.embeds,
    }


def _tell_faults(catalog: "Catalog") -> None:
    for name, fault in catalog.faults().items():
        print(f"{name} cannot be served: {fault}", file=sys.stderr)


def _print_table(entries: list["ModelEntry"]) -> None:
    from rich.console import Console

    contexts = [f"{entry.context_length:,}" if entry.context_length else "?" for entry in entries]
    columns = [
        Column("ID", [entry.id for entry in entries]),
        Column("Source", [entry.source for entry in entries], 4),
        Column("Type", [entry.model_type or "?" for entry in entries], 3),
        Column("Size", [gigabytes(entry.size) for entry in entries], 1, number=True),
        Column("Context", contexts, 2, number=True),
    ]
    console = Console(markup=False, highlight=False)
    console.print(table(columns, console.width))


def rm(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="ID...",
            help="As `mlx-server list` shows them, those that cannot be served too.",
            autocompletion=complete_removable,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Remove models from the disk, unless a server has them loaded."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.removal import removal_of, remove
    from mlx_server.models.store.sources import ModelSources

    settings = load_settings(config)
    catalog = Catalog(ModelSources.of(settings))
    # All, before any is removed: one name may be wrong.
    removals = [removal_of(name, catalog) for name in dict.fromkeys(models)]
    sizes = [_size(removal) for removal in removals]
    if not yes:
        _confirm(removals, sizes)
    for removal in removals:
        remove(removal, settings.home)
        if not as_json:
            print(f"{removal.id} is removed.")
    if as_json:
        pairs = zip(removals, sizes, strict=True)
        print_json([{"id": removal.id, "place": removal.place, "size": s} for removal, s in pairs])


def _confirm(removals: "list[Removal]", sizes: list[int]) -> None:
    """Where nobody can be asked, the command alone is the word."""
    if not sys.stdin.isatty():
        return
    for removal, size in zip(removals, sizes, strict=True):
        question = f"Remove {removal.id} ({gigabytes(size)}) in {removal.place}?"
        typer.confirm(question, abort=True, err=True)


def _size(removal: "Removal") -> int:
    """Bytes of its files, each once however often it is linked to."""
    snapshots = [removal.place / "snapshots" / commit for commit in removal.revisions]
    try:
        files = [file for place in snapshots or [removal.place] for file in place.rglob("*")]
        stats = [file.stat() for file in files if file.is_file()]
    except OSError as error:
        raise BadRequest(f"{removal.place} cannot be read: {reason(error)}") from error
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
