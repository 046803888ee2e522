"""`pull`, `list` and `rm`: models on this machine's disk."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_server.cli.options import ConfigOption, load_settings

if TYPE_CHECKING:
    from mlx_server.models.store.sources import ModelSources
    from mlx_server.models.store.transfer import Progress


def pull(
    model: Annotated[
        str, typer.Argument(metavar="ID|GGUF", help="ORG/NAME, smollm2-135m, or a GGUF file.")
    ],
    config: ConfigOption = None,
) -> None:
    """Fetch a model, so that it can be served."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.sources import ModelSources

    sources = ModelSources.of(load_settings(config))
    if os.path.isfile(os.path.expanduser(model)):
        path = Catalog(sources).add(model).path
    else:
        path = fetch_with_bar(model, sources)
    print(f"{model} is ready in {path}")


def list_models(config: ConfigOption = None) -> None:
    """Show the models that can be served now."""
    from rich.console import Console
    from rich.table import Table

    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.demo import DEMO
    from mlx_server.models.store.sources import ModelSources

    catalog = Catalog(ModelSources.of(load_settings(config)))
    entries = catalog.entries()
    for name, fault in catalog.faults().items():
        print(f"{name} cannot be served: {fault}", file=sys.stderr)
    if not entries:
        print(f"No models yet. Try `mlx-server pull {DEMO}`.")
        return
    table = Table("ID", "Source", "Type", box=None, pad_edge=False, header_style="bold")
    table.columns[0].overflow = "fold"
    table.add_column("Size", justify="right")
    table.add_column("Context", justify="right")
    for entry in entries:
        context = f"{entry.context_length:,}" if entry.context_length else "?"
        table.add_row(entry.id, entry.source, entry.model_type, _gigabytes(entry.size), context)
    Console().print(table)


def rm(
    model: Annotated[str, typer.Argument(metavar="ID", help="As `mlx-server list` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigOption = None,
) -> None:
    """Remove a model from the disk, unless a server has it loaded."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.removal import plan_removal, remove
    from mlx_server.models.store.sources import ModelSources

    settings = load_settings(config)
    entry = Catalog(ModelSources.of(settings)).find(model)
    removal = plan_removal(entry, settings.models_folder)
    if not yes and sys.stdin.isatty():
        typer.confirm(
            f"Remove {entry.id} ({_gigabytes(entry.size)}) in {removal.place}?", abort=True
        )
    remove(removal, settings.home)
    print(f"{entry.id} is removed.")


def fetch_with_bar(name: str, sources: "ModelSources") -> Path:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as ProgressBar

    from mlx_server.models.store.fetch import fetch

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    if quiet:
        print(f"fetching {name}", file=sys.stderr, flush=True)
    with ProgressBar(text, *columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("Starting", total=None)

        def show(progress: "Progress") -> None:
            total = progress.total or None
            bar.update(task, description=progress.stage, completed=progress.done, total=total)

        return fetch(name, sources, show)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
