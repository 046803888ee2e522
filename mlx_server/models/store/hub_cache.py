"""The Hugging Face cache: models--ORG--NAME/{refs/REVISION, snapshots/COMMIT/..., blobs/}."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mlx_server.models.store.folder import folder_fault, subfolders

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,120})?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")


def is_repo_id(name: str) -> bool:
    """`org/name[@revision]`."""
    return REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached_models() -> Iterator[tuple[str, Path]]:
    """Complete snapshots as `org/name` (main) or `org/name@ref`; an incomplete main one if there is
    no other.
    """
    for repo in subfolders(cache_folder()):
        kind, *parts = repo.name.split("--")
        if kind != "models" or not 1 <= len(parts) <= 2:
            continue
        name = "/".join(parts)
        refs = _refs(repo)
        main = refs.pop("main", None) or _newest(repo)
        if main is not None:
            yield name, main
        for ref, snapshot in sorted(refs.items()):
            yield f"{name}@{ref}", snapshot


def cached_commit(name: str) -> Path | None:
    if not is_repo_id(name):
        return None
    repo, _, commit = name.partition("@")
    return _complete_snapshot(repo_folder(repo), commit)


def _complete_snapshot(repo: Path, commit: str) -> Path | None:
    snapshot = repo / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and folder_fault(snapshot) is None else None


def _refs(repo: Path) -> dict[str, Path]:
    found = {}
    try:
        for file in (repo / "refs").rglob("*"):
            if file.is_file():
                commit = file.read_text(encoding="ascii").strip()
                if snapshot := _complete_snapshot(repo, commit):
                    found[file.relative_to(repo / "refs").as_posix()] = snapshot
    except (OSError, ValueError):
        return found
    return found


def _newest(repo: Path) -> Path | None:
    """The newest complete snapshot, else the newest."""
    snapshots = subfolders(repo / "snapshots")
    complete = [path for path in snapshots if folder_fault(path) is None]
    try:
        return max(complete or snapshots, key=os.path.getmtime, default=None)
    except OSError:
        # Cleared meanwhile.
        return None
