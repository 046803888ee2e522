"""Converts GGUF files in a process of its own, which holds the arrays."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_server.errors import BadRequest, ModelLoadFailed, ServerError
from mlx_server.models.store import gguf
from mlx_server.models.store.folder import PARTIAL, folder_fault, read_json
from mlx_server.models.store.locks import write_lock
from mlx_server.models.store.transfer import check_space

ORIGIN = "origin.json"
"""What an imported folder was made from."""


def import_into(source: Path, models_folder: Path, bits: int | None = None) -> Path:
    """The converted folder, made unless current. Raises BadRequest if another model has its name,
    and as `import_gguf`.
    """
    name = source.stem
    if name.startswith(".") or name.endswith(PARTIAL):
        raise BadRequest(f"{source.name} is no name for a model")
    folder = models_folder / name
    try:
        with write_lock(folder):
            _clear_leftovers(folder)
            if not folder.exists() or not _is_current(folder, source, bits):
                import_gguf(source, folder, bits)
    except OSError:
        # Where nothing can be written, what is there will do.
        if folder_fault(folder) is not None or not _is_current(folder, source, bits):
            raise
    return folder


def import_gguf(source: Path, folder: Path, bits: int | None = None) -> None:
    """Make or replace `folder` atomically, quantized to `bits` or as `source` is. Needs its
    `write_lock`. Raises BadRequest for an unsupported file, ServerError if the conversion breaks
    off.
    """
    if not source.is_file():
        raise BadRequest(f"there is no GGUF file at {source}")
    _clear_leftovers(folder)
    check_space(folder.parent, source.stat().st_size)
    new, old = _temporary(folder)
    new.mkdir()
    try:
        _run_conversion(source, new, bits)
        (new / ORIGIN).write_text(
            json.dumps(_origin(source, bits), indent=2) + "\n", encoding="utf-8"
        )
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        _clear_leftovers(folder)


def _temporary(folder: Path) -> tuple[Path, Path]:
    new, old = (folder.with_name(f"{folder.name}.{step}{PARTIAL}") for step in ("new", "old"))
    return new, old


def _clear_leftovers(folder: Path) -> None:
    for temporary in _temporary(folder):
        shutil.rmtree(temporary, ignore_errors=True)


def _is_current(folder: Path, source: Path, bits: int | None) -> bool:
    """Raises BadRequest if `folder` was not made from `source`."""
    try:
        origin = read_json(folder / ORIGIN)
    except ModelLoadFailed:
        origin = None
    if not isinstance(origin, dict) or origin.get("path") != str(source.resolve()):
        raise BadRequest(
            f"another model is called {folder.name} already ({folder}): rename {source.name}"
        )
    return bool(origin == _origin(source, bits))


def _origin(source: Path, bits: int | None) -> dict[str, Any]:
    status = source.stat()
    wanted = {} if bits is None else {"bits": bits}
    return {
        "path": str(source.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    } | wanted


def _run_conversion(source: Path, folder: Path, bits: int | None) -> None:
    wanted = [] if bits is None else [str(bits)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", gguf.__name__, str(source), str(folder), *wanted],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"the process ended with status {done.returncode}"
    if done.returncode == gguf.REFUSED:
        raise BadRequest(f"cannot import {source.name}: {reason}")
    raise ServerError(f"importing {source.name} failed: {reason}")
