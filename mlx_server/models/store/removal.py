"""Removes models from our models folder and the hub cache only. Blocks."""

import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_server.errors import BadRequest, ModelNotFound, Unavailable, reason
from mlx_server.models.store.catalog import Catalog, ModelEntry
from mlx_server.models.store.folder import PARTIAL, subfolders
from mlx_server.models.store.hub_cache import cache_folder, is_repo_id, repo_folder
from mlx_server.models.store.locks import RemovalLock, try_write_lock

LONGEST_NAME = 255
"""Bytes of a file's name on common file systems."""


@dataclass(frozen=True, slots=True)
class Removal:
    """Our folder, or `revisions` of a cached repo."""

    id: str
    place: Path
    revisions: tuple[str, ...] = ()


def removal_of(name: str, catalog: Catalog) -> Removal:
    """Of a model that is listed, or of what cannot be served: a damaged model, a broken download.
    Raises ModelNotFound, and BadRequest as `plan_removal`.
    """
    models_folder = catalog.sources.models_folder
    try:
        return plan_removal(catalog.find(name), models_folder)
    except ModelNotFound:
        if removal := _unlisted(name, models_folder):
            return removal
        raise


def _unlisted(name: str, models_folder: Path) -> Removal | None:
    parts = name.split("/")
    if len(parts) > 2 or not all(map(_is_folder_name, parts)):
        return None
    for folder in (models_folder / name, models_folder / f"{name}.download{PARTIAL}"):
        ours = models_folder.resolve() in folder.resolve().parents
        # Not a folder of models.
        holds_models = any((child / "config.json").is_file() for child in subfolders(folder))
        if ours and folder.is_dir() and not holds_models:
            return Removal(name, folder.resolve())
    if is_repo_id(name) and "@" not in name and (repo := repo_folder(name)).is_dir():
        return Removal(name, repo.resolve(), _commits(repo))
    return None


def _is_folder_name(part: str) -> bool:
    sane = part.isprintable() and not part.startswith(".")
    return sane and 0 < len(part.encode()) <= LONGEST_NAME


def plan_removal(entry: ModelEntry, models_folder: Path) -> Removal:
    """`org/name@ref` is one revision, `org/name` all of them. Raises BadRequest for a model that is
    not ours.
    """
    if entry.adapter_path is not None:
        raise BadRequest(
            f"{entry.id} is an adapter on top of another model; remove the adapter's folder "
            "yourself.",
            param="model",
        )
    folder = (entry.path or Path()).resolve()
    if models_folder.resolve() in folder.parents:
        return Removal(entry.id, folder)
    repo = folder.parent.parent
    if repo.parent == cache_folder().resolve() and re.fullmatch("models--.+", repo.name):
        return Removal(entry.id, repo, (folder.name,) if "@" in entry.id else _commits(repo))
    raise BadRequest(
        f"{entry.id} is neither below {models_folder} nor in the hub's cache, and "
        "nothing else is removed. Remove its folder yourself.",
        param="model",
    )


def remove(removal: Removal, home: Path) -> None:
    """Raises BadRequest while a server with this `home` has it loaded, or it is pulled."""
    folders = [removal.place / "snapshots" / commit for commit in removal.revisions]
    with ExitStack() as locks:
        locks.enter_context(try_write_lock(removal.place))
        for folder in folders or [removal.place]:
            locks.enter_context(RemovalLock(home, folder))
        try:
            if removal.revisions:
                _remove_revisions(removal)
            else:
                _remove_folder(removal.place)
        except OSError as error:
            raise Unavailable(f"{removal.place.name} cannot be removed: {reason(error)}") from error


def _remove_folder(folder: Path) -> None:
    # Renamed first: a half-removed folder is no model.
    doomed = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _remove_revisions(removal: Removal) -> None:
    from huggingface_hub import scan_cache_dir

    everything = removal.revisions == _commits(removal.place)
    cache = scan_cache_dir(removal.place.parent)
    # A fork has the same commits.
    cache = replace(cache, repos=frozenset(r for r in cache.repos if r.repo_path == removal.place))
    cache.delete_revisions(*removal.revisions).execute()
    if everything and removal.place.exists():
        # The library skips repos with a damaged revision, such as an unfinished update.
        shutil.rmtree(removal.place)


def _commits(repo: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (repo / "snapshots").glob("*")))
