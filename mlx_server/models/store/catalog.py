"""The models in folders and the hub cache, with aliases and adapters. The one place that knows
what a name in a request means.
"""

import difflib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_server.dimensions import context_length
from mlx_server.errors import BadRequest, ModelLoadFailed, ModelNotFound, reason
from mlx_server.models.store.demo import PACKAGED
from mlx_server.models.store.embedding_files import (
    is_cross_encoder,
    is_embedding_model,
    max_seq_length,
)
from mlx_server.models.store.folder import (
    folder_fault,
    is_text,
    model_config,
    subfolders,
)
from mlx_server.models.store.gguf_import import import_into
from mlx_server.models.store.hub_cache import cached_commit, cached_models, is_repo_id
from mlx_server.models.store.lora import LoraAdapter, find_adapters
from mlx_server.models.store.patterns import matching
from mlx_server.models.store.sources import ModelSources

SCAN_SECONDS = 1.0
"""How long a disk scan is reused."""
SHOWN_CHARACTERS = 200
LATEST = ":latest"
"""What Ollama's clients put behind names without a tag."""

Source = Literal["folder", "hub", "package", "command line", "adapter"]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """`path` is an MLX folder, None until pulled; `size` is bytes on disk, `created` seconds since
    the epoch; `adapter_path` a LoRA adapter for `path`; `embeds`: makes vectors and cannot
    generate; `reranks`: of these, scores pairs of texts and nothing else.
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
    embeds: bool = False
    reranks: bool = False

    def context_within(self, limit: int | None) -> int | None:
        """Tokens of context that are left where a setting limits them."""
        return least_known(self.context_length, limit)


@dataclass(frozen=True, slots=True)
class _Scan:
    """At `time` (monotonic); `faults`: why others cannot be served, by name."""

    time: float
    entries: tuple[ModelEntry, ...]
    names: dict[str, ModelEntry]
    faults: dict[str, str]


class Catalog:
    """Finds models by id or alias; by path for the operator only. Reads the disk."""

    def __init__(self, sources: ModelSources) -> None:
        self.sources = sources
        self._lock = threading.Lock()
        self._added: dict[str, tuple[Path, tuple[str, ...]]] = {}
        self._last: _Scan | None = None

    def entries(self) -> list[ModelEntry]:
        """Each servable model once, by id."""
        return list(self._scan().entries)

    def faults(self) -> dict[str, str]:
        """Why what looks like a model cannot be served, by name."""
        scan = self._scan()
        return {name: why for name, why in sorted(scan.faults.items()) if name not in scan.names}

    def find(self, model_id: str) -> ModelEntry:
        """By id, alias, or pattern among the aliases, each with or without `:latest`. Never treats
        `model_id` as a path. Raises ModelNotFound with close matches.
        """
        scan = self._scan()
        bare = model_id.removesuffix(LATEST)
        pattern = matching(bare, self.sources.aliases)
        for name in filter(None, (model_id, bare, pattern)):
            if name in scan.names:
                return scan.names[name]
        raise ModelNotFound(self._not_found(model_id, pattern or bare, scan), param="model")

    def add(self, name: str) -> ModelEntry:
        """Resolve an id, an alias, or the operator's path (folder or GGUF file), which `find` then
        knows by its folder's name and as written. Raises ModelNotFound, BadRequest for a path that
        is no model.
        """
        self.refresh()
        if name not in self._scan().names and (folder := self._folder_of(name)):
            self._register(folder, name)
        return self.find(name)

    def refresh(self) -> None:
        with self._lock:
            self._last = None

    def _folder_of(self, name: str) -> Path | None:
        try:
            path = Path(name).expanduser()
            if os.path.isfile(path) and path.suffix.lower() == ".gguf":
                return import_into(path, self.sources.models_folder, self.sources.gguf_bits)
        except (OSError, RuntimeError) as error:
            raise BadRequest(f"cannot use {name}: {reason(error)}") from error
        if not os.path.isdir(path):
            return cached_commit(name)
        if not is_text(str(path)):
            raise BadRequest(f"the name of {str(path)!r} is no UTF-8, so no request could spell it")
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
            if self._last is None or time.monotonic() - self._last.time > SCAN_SECONDS:
                self._last = self._read_disk()
            return self._last

    def _read_disk(self) -> _Scan:
        names, faults = self._base_models()
        variants, adapter_faults = self._adapter_entries(names)
        faults |= adapter_faults
        names = variants | names
        for alias in self.sources.aliases:
            target = names.get(self._resolve_alias(alias))
            if target is not None and alias not in names:
                named = _with_aliases(target, (alias,))
                names |= {name: named for name, entry in names.items() if entry is target}
                names[alias] = named
        entries = {entry.id: entry for entry in names.values()}
        listed = tuple(entries[key] for key in sorted(entries))
        return _Scan(time.monotonic(), listed, names, faults)

    def _base_models(self) -> tuple[dict[str, ModelEntry], dict[str, str]]:
        found: dict[Path, ModelEntry] = {}
        faults: dict[str, str] = {}
        taken: set[str] = set()
        for name, folder, source, aliases in self._candidates():
            entry = _entry(folder, name, source, aliases)
            if isinstance(entry, str):
                faults.setdefault(name, entry)
                continue
            place = folder.resolve()
            if place in found:
                found[place] = _with_aliases(found[place], (entry.id, *entry.aliases))
            elif entry.id not in taken:
                found[place] = entry
            taken.add(entry.id)
        names = {name: entry for entry in found.values() for name in entry.aliases}
        return names | {entry.id: entry for entry in found.values()}, faults

    def _candidates(self) -> Iterator[tuple[str, Path, Source, tuple[str, ...]]]:
        for name, (folder, names) in self._added.items():
            yield name, folder, "command line", tuple(other for other in names if other != name)
        for parent in (self.sources.models_folder, *self.sources.model_dirs):
            for name, folder in _model_folders(parent):
                packaged = name in PACKAGED and parent == self.sources.models_folder
                yield name, folder, "package" if packaged else "folder", ()
        for name, folder in cached_models():
            yield name, folder, "hub", ()

    def _adapter_entries(
        self, bases: dict[str, ModelEntry]
    ) -> tuple[dict[str, ModelEntry], dict[str, str]]:
        variants: dict[str, ModelEntry] = {}
        faults: dict[str, str] = {}
        for adapter in find_adapters(self.sources):
            base = bases.get(self._resolve_alias(adapter.base))
            variant = f"{base.id if base else adapter.base}@{adapter.name}"
            fault = adapter.fault if base else f"there is no model {adapter.base!r}"
            if fault or base is None:
                faults.setdefault(variant, fault or "")
            else:
                with suppress(OSError):  # removed during the scan
                    variants.setdefault(variant, _adapter_entry(base, variant, adapter))
        return variants, faults

    def _resolve_alias(self, name: str) -> str:
        aliases, seen = self.sources.aliases, set()
        while name in aliases and name not in seen:
            seen.add(name)
            name = aliases[name]
        return name

    def _not_found(self, model_id: str, name: str, scan: _Scan) -> str:
        target = self._resolve_alias(name)
        shown = model_id[:SHOWN_CHARACTERS]
        fetching = f"`mlx-server pull {target}`"
        if target in PACKAGED and target not in scan.faults:
            return f"The model {shown!r} is not here yet: run {fetching} first."
        message = f"There is no model {shown!r}."
        if target in scan.faults:
            message = f"The model {shown!r} cannot be used: {scan.faults[target]}."
        elif close := difflib.get_close_matches(shown, scan.names, n=3, cutoff=0.5):
            message += f" Close: {', '.join(close)}."
        is_adapter = "@" in target and target in scan.faults
        if is_repo_id(target) and not is_adapter:
            message += f" To fetch it: {fetching}."
        return message


def _entry(folder: Path, name: str, source: Source, aliases: tuple[str, ...]) -> ModelEntry | str:
    """Or why it cannot be served."""
    config = model_config(folder)
    if fault := folder_fault(folder):
        return fault
    try:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        created = int((folder / "config.json").stat().st_mtime)
    except OSError:
        config = None
    if config is None:
        return "it was removed just now"
    embeds = is_embedding_model(folder, config)
    return ModelEntry(
        id=name,
        path=folder,
        source=source,
        aliases=aliases,
        size=size,
        created=created,
        model_type=config["model_type"],
        context_length=_max_text_length(folder, config) if embeds else context_length(config),
        embeds=embeds,
        reranks=is_cross_encoder(config),
    )


def _max_text_length(folder: Path, config: dict[str, Any]) -> int | None:
    try:
        return least_known(context_length(config), max_seq_length(folder))
    except ModelLoadFailed:  # loading will report it
        return None


def least_known(*lengths: int | None) -> int | None:
    return min((length for length in lengths if length is not None), default=None)


def _adapter_entry(base: ModelEntry, id_: str, adapter: LoraAdapter) -> ModelEntry:
    return replace(
        base,
        id=id_,
        source="adapter",
        aliases=(),
        size=adapter.size,
        created=adapter.created,
        adapter_path=adapter.folder,
    )


def _with_aliases(entry: ModelEntry, names: tuple[str, ...]) -> ModelEntry:
    others = dict.fromkeys(name for name in (*entry.aliases, *names) if name != entry.id)
    return replace(entry, aliases=tuple(others))


def _model_folders(parent: Path) -> Iterator[tuple[str, Path]]:
    for child in subfolders(parent):
        if os.path.isfile(child / "config.json"):
            yield child.name, child
            continue
        for grandchild in subfolders(child):
            if os.path.isfile(grandchild / "config.json"):
                yield f"{child.name}/{grandchild.name}", grandchild
