"""Removing models: folders below `Settings.models_folder`, and repos in the Hugging Face cache.

Nothing else is ever removed. Calls block; give them a thread.
"""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_server.config import Settings
from mlx_server.errors import BadRequest, Unavailable
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.gguf import PARTIAL, making_lock
from mlx_server.models.store.locks import RemovalLock


@dataclass(frozen=True, slots=True)
class Removal:
    """What will be removed for a model: a folder of ours, or revisions of a cached repo."""

    place: Path
    """The model's folder, or its repo's in the cache."""
    revisions: tuple[str, ...] = ()


def plan_removal(entry: ModelEntry, settings: Settings) -> Removal:
    """What `remove` would remove. Raises BadRequest for a model that is not ours to remove.

    A repo's main revision stands for all of it; another revision for itself alone.
    """
    if entry.adapter_path is not None:
        raise BadRequest(
            f"{entry.id} is an adapter on top of another model; remove the adapter's folder "
            "yourself.",
            param="model",
        )
    folder = (entry.path or Path()).resolve()
    ours = settings.models_folder.resolve()
    if ours in folder.parents:
        return Removal(folder)
    repo = folder.parent.parent
    if repo.parent == _cache_folder() and re.fullmatch("models--.+", repo.name):
        whole = "@" not in entry.id
        commits = _commits(repo) if whole else (folder.name,)
        return Removal(repo, commits)
    raise BadRequest(
        f"{entry.id} is neither below {settings.models_folder} nor in the hub's cache, and "
        "nothing else is removed. Remove its folder yourself.",
        param="model",
    )


def remove(removal: Removal, settings: Settings) -> None:
    """Remove what was planned.

    Raises BadRequest while any server of this user has it loaded, or while it is being pulled.
    """
    folders = [removal.place / "snapshots" / commit for commit in removal.revisions]
    with ExitStack() as locks:
        locks.enter_context(_nobody_makes(removal.place))
        for folder in folders or [removal.place]:
            locks.enter_context(RemovalLock(settings.home, folder))
        try:
            if removal.revisions:
                _remove_revisions(removal)
            else:
                _remove_folder(removal.place)
        except OSError as error:
            raise Unavailable(f"{removal.place.name} cannot be removed: {error}") from error


def _remove_folder(folder: Path) -> None:
    # Renamed first: a folder that is half removed is no model.
    doomed = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _remove_revisions(removal: Removal) -> None:
    from huggingface_hub import scan_cache_dir

    everything = removal.revisions == _commits(removal.place)
    cache = scan_cache_dir(removal.place.parent)
    # Of this repo alone: a fork has the same commits.
    cache = replace(cache, repos=frozenset(r for r in cache.repos if r.repo_path == removal.place))
    cache.delete_revisions(*removal.revisions).execute()
    if everything and removal.place.exists():
        # The library passes over a repo with a damaged revision, such as an unfinished update.
        shutil.rmtree(removal.place)


def _commits(repo: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (repo / "snapshots").iterdir()))


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


@contextmanager
def _nobody_makes(folder: Path) -> Iterator[None]:
    """Keep pulls of `folder` away; raises BadRequest when one is under way."""
    with making_lock(folder).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(f"{folder.name} is being pulled.", param="model") from error
        yield
