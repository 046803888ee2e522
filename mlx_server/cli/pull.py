"""`pull`: fetch models, several at once, their sizes first."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_server.cli.completing import complete_fetchable
from mlx_server.cli.options import (
    ConfigOption,
    JsonOption,
    complain,
    gigabytes,
    load_settings,
    print_json,
)
from mlx_server.cli.terminal import quiet_keyboard
from mlx_server.errors import ServerError

if TYPE_CHECKING:
    from mlx_server.models.store.sources import ModelSources
    from mlx_server.models.store.transfer import OnProgress, Progress, Size

PARALLEL = 3
"""Models at once; each takes several connections."""


@dataclass
class Pull:
    """One model, as it was asked for, and what became of it."""

    name: str
    size: "Size | None" = None
    path: Path | None = None
    error: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        size = self.size.total if self.size else None
        return {"model": self.name, "path": self.path, "size": size, "error": self.error}


def pull(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="ID|GGUF...",
            help="ORG/NAME, ORG/NAME@REVISION, smollm2-135m, or a GGUF file.",
            autocompletion=complete_fetchable,
        ),
    ],
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Fetch models, so that they can be served. What was broken off goes on where it stopped."""
    from mlx_server.models.store.sources import ModelSources

    pulls = [Pull(name) for name in dict.fromkeys(models)]
    try:
        _run(pulls, ModelSources.of(load_settings(config)))
    except KeyboardInterrupt:
        complain("stopped; the same command goes on from here")
        # Not after the threads, which may hang on a connection: what is on the disk is resumed.
        os._exit(130)
    if as_json:
        print_json([one.facts for one in pulls])
    for one in pulls:
        if one.error:
            complain(one.error)
        elif not as_json:
            print(f"{one.name} is ready in {one.path}")
    if any(one.error for one in pulls):
        raise typer.Exit(1)


def fetch_with_bar(name: str, sources: "ModelSources") -> Path:
    """Raises what `fetch` raises."""
    from mlx_server.models.store.fetch import fetch

    with _bars([name]) as (on_progress,):
        return fetch(name, sources, on_progress)


def _run(pulls: list[Pull], sources: "ModelSources") -> None:
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.fetch import fetch

    files = [one for one in pulls if os.path.isfile(os.path.expanduser(one.name))]
    for one in files:
        with _noted(one):
            one.path = Catalog(sources).add(one.name).path
    _measure([one for one in pulls if one not in files], sources)
    wanted = [one for one in pulls if one not in files and one.error is None]
    if not wanted:
        return
    _tell_sizes(wanted, sources.models_folder)

    def fetch_one(one: Pull, on_progress: "OnProgress") -> None:
        with _noted(one):
            one.path = fetch(one.name, sources, on_progress)

    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull")
    with _bars([one.name for one in wanted]) as reports:
        list(pool.map(fetch_one, wanted, reports))
    pool.shutdown()


def _measure(pulls: list[Pull], sources: "ModelSources") -> None:
    from mlx_server.models.store.fetch import size_of

    def measure(one: Pull) -> None:
        with _noted(one):
            one.size = size_of(one.name, sources)

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(measure, pulls))


@contextmanager
def _noted(one: Pull) -> Iterator[None]:
    """One that fails keeps no other from being fetched."""
    try:
        yield
    except ServerError as error:
        one.error = " ".join(str(error).split())


def _tell_sizes(pulls: Sequence[Pull], folder: Path) -> None:
    sizes = [one.size for one in pulls if one.size]
    for one in pulls:
        if one.size:
            print(f"{one.name}: {_told(one.size)}", file=sys.stderr, flush=True)
    if len(pulls) > 1:
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        missing = sum(size.missing for size in sizes)
        free = gigabytes(shutil.disk_usage(place).free)
        print(f"together {gigabytes(missing)} to fetch, {free} free", file=sys.stderr, flush=True)


def _told(size: "Size") -> str:
    if size.missing == 0:
        return f"{gigabytes(size.total)}, all here"
    if size.missing < size.total:
        return f"{gigabytes(size.total)}, {gigabytes(size.missing)} still to fetch"
    return gigabytes(size.total)


@contextmanager
def _bars(names: Sequence[str]) -> Iterator[Sequence["OnProgress"]]:
    """A bar for each name, moved by the callbacks."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as ProgressBar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    if quiet:
        print(f"fetching {', '.join(names)}", file=sys.stderr, flush=True)
    progress = ProgressBar(text, *columns, console=console, transient=True, disable=quiet)
    with quiet_keyboard(), progress as bar:

        def reporter(task: TaskID) -> "OnProgress":
            def show(progress: "Progress") -> None:
                total = progress.total or None
                bar.update(task, description=progress.stage, completed=progress.done, total=total)

            return show

        yield [reporter(bar.add_task(name, total=None)) for name in names]
