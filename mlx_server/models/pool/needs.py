"""Plans models' memory."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from mlx_server.dimensions import Way, division
from mlx_server.engine.protocol import Device, Embedding, LoadOptions, Ready
from mlx_server.errors import InsufficientMemory, ModelLoadFailed
from mlx_server.models.pool.footprint import Footprint, read_embedding_footprint, read_footprint
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.embedding_files import read_embedding
from mlx_server.models.store.folder import read_config
from mlx_server.units import parse_bytes

Format = Literal["auto", "always", "both", "packed", "never"]
"""`LoadOptions.dequantize`"""
DEFAULT_KV_SHARE = "25%"
"""Of the budget, per model."""
CUDA_CONTEXT = 1536 << 20
"""The driver's context of a process, 550 MiB on an H100, and the graphs that `engine/run/cuda.py`
has MLX keep, some 4 MB each."""
MIN_KV_TOKENS = 2048
"""A model loads only if its KV cache holds one such sequence."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of weights, KV caches, working memory, and what an engine takes beside its arrays."""

    weights: int
    kv: int
    working: int
    overhead: int = 0

    @property
    def arrays(self) -> int:
        return self.weights + self.kv + self.working

    @property
    def total(self) -> int:
        return self.arrays + self.overhead


@dataclass(frozen=True, slots=True)
class LoadPlan:
    entry: ModelEntry
    path: Path
    footprint: Footprint
    need: Need
    options: LoadOptions
    embedding: Embedding | None
    wired: int = 0
    """Bytes that each process may wire; once loaded, that it has wired."""
    replicas: int = 1
    """Engines, each of as many processes as its options have `ranks`; each process takes `need`."""
    draft: ModelEntry | None = None
    hosts: tuple[str, ...] = ()
    """Other machines, those to be taken first; the others are spares. Each takes one rank, this one
    having rank 0, or one replica, this one having the first.
    """

    @property
    def processes(self) -> int:
        """Which share this machine's device."""
        return 1 if self.hosts else self.replicas * _ranks_here(self.options)

    @property
    def bytes(self) -> int:
        """Of this machine."""
        return self.need.total * self.processes


@dataclass(slots=True)
class MemoryPlanner:
    kv_cache: str | None
    """Per model: bytes, or a share of the budget."""
    budget: int = 0
    on_cpu: bool = False
    packs: bool = False
    """Whether engines multiply by quantized weights as they are."""
    overhead: int = 0
    """Bytes of each engine beside its arrays."""
    wirable: int = 0
    """Bytes that all models together may wire."""
    _measured: dict[Footprint, int] = field(default_factory=dict)

    def use(self, device: Device, memory_limit: str, wired_memory: str) -> None:
        """The limits are as in the settings."""
        self.budget = device.budget(memory_limit)
        self.on_cpu, self.packs = device.name == "cpu", device.packs
        self.overhead = CUDA_CONTEXT if device.name == "cuda" else 0
        self.wirable = device.wired(wired_memory)

    def plan(
        self,
        entry: ModelEntry,
        options: LoadOptions,
        replicas: int = 1,
        draft: ModelEntry | None = None,
        hosts: tuple[str, ...] = (),
    ) -> LoadPlan:
        """With a `draft` model beside it, on this machine and on `hosts`. Blocks on files. Raises
        ModelLoadFailed, InsufficientMemory beyond `budget`.
        """
        if entry.path is None:
            raise ModelLoadFailed("it has not been pulled yet")
        if draft is not None:
            options = msgspec.structs.replace(options, draft_path=str(_draft_folder(draft)))
        if hosts and replicas > 1:
            _check_replicas(entry, options, replicas, 1 + len(hosts))
        elif hosts and not entry.embeds:
            options = msgspec.structs.replace(options, ranks=_ranks(options, 1 + len(hosts)))
        plan = self._first_that_fits(entry, entry.path, options, replicas, hosts)
        return replace(plan, draft=draft)

    def _first_that_fits(
        self,
        entry: ModelEntry,
        path: Path,
        options: LoadOptions,
        replicas: int,
        hosts: tuple[str, ...],
    ) -> LoadPlan:
        """A format is slower than the one before it, and smaller."""
        formats: list[Format] = [options.dequantize]
        if options.dequantize == "auto":
            formats = ["both", "always", "packed", "never"] if self.on_cpu else ["never"]
        if not self.packs or options.ranks > 1 or entry.embeds:
            formats = [format_ for format_ in formats if format_ not in ("both", "packed")]
        for format_ in formats[:-1]:
            with suppress(InsufficientMemory):
                return self._plan(entry, path, options, format_, replicas, hosts)
        return self._plan(entry, path, options, formats[-1], replicas, hosts)

    def grant_wired(self, plan: LoadPlan, others: int) -> LoadPlan:
        """`others`: bytes that other models may wire or have wired."""
        left = (self.wirable - others) // plan.processes
        return replace(plan, wired=max(0, min(plan.need.arrays, left)))

    def correct(self, plan: LoadPlan, facts: Ready) -> LoadPlan:
        self._measured[plan.footprint] = facts.weights_bytes
        need = plan.need
        left = need.arrays - facts.weights_bytes - facts.kv_limit
        working = max(0, min(need.working, left))
        corrected = Need(facts.weights_bytes, facts.kv_limit, working, need.overhead)
        return replace(plan, need=corrected, wired=facts.memory.wired)

    def _plan(
        self,
        entry: ModelEntry,
        path: Path,
        options: LoadOptions,
        format_: Format,
        replicas: int,
        hosts: tuple[str, ...],
    ) -> LoadPlan:
        float32, packed = format_ in ("always", "both"), format_ in ("packed", "both")
        embedding, longest = None, None
        if entry.embeds:
            files = read_embedding(path)
            embedding, longest = files.embedding, files.longest
            footprint = read_embedding_footprint(path, float32, longest)
            options = msgspec.structs.replace(options, ranks=1)
            hosts = hosts if replicas > 1 else ()
        else:
            way = _division(entry, path, options)
            head = options.speculation == "auto" and options.draft_path is None
            whole = read_footprint(
                path,
                float32,
                entry.adapter_path,
                options.kv_bits,
                packed,
                head=head and options.ranks == 1,
            )
            footprint = whole.of_rank(options.ranks, way)
        if options.draft_path is not None:
            draft_path = Path(options.draft_path)
            draft = read_footprint(draft_path, float32, None, options.kv_bits, packed)
            footprint = footprint.beside(draft)
        limits = [limit for limit in (options.context_length, longest) if limit is not None]
        options = msgspec.structs.replace(
            options,
            dequantize=format_,
            context_length=min(limits, default=None),
        )
        here = (1, 1) if hosts else (replicas, _ranks_here(options))
        need = self._need(footprint, options, *here)
        return LoadPlan(
            entry, path, footprint, need, options, embedding, replicas=replicas, hosts=hosts
        )

    def _need(self, footprint: Footprint, options: LoadOptions, replicas: int, ranks: int) -> Need:
        """Of each process, so many `replicas` of so many `ranks` being on this machine."""
        processes = replicas * ranks
        weights = self._measured.get(footprint, footprint.weights)
        context = min(footprint.context_length, options.context_length or footprint.context_length)
        working = footprint.working(options.max_batch)
        smallest_kv = footprint.kv(min(context, MIN_KV_TOKENS))
        fixed = weights + working + self.overhead
        least = fixed + smallest_kv
        if least * processes > self.budget:
            raise InsufficientMemory(
                f"it needs {least * processes:,} bytes of memory{_among(replicas, ranks)} "
                f"and all models together may take {self.budget:,}"
            )
        of_all = parse_bytes(self.kv_cache or DEFAULT_KV_SHARE, self.budget)
        usual = max(smallest_kv, of_all // processes)
        largest = options.max_batch * footprint.kv(context)
        kv = min(largest, usual, self.budget // processes - fixed)
        return Need(weights, kv, working, self.overhead)


def _ranks_here(options: LoadOptions) -> int:
    """Those of one machine that share a device."""
    return 1 if options.ranks_over == "nccl" else options.ranks


def _draft_folder(draft: ModelEntry) -> Path:
    """Raises ModelLoadFailed for a model that cannot be one."""
    named = f"its draft model `{draft.id}`"
    if draft.path is None:
        raise ModelLoadFailed(f"{named} has not been pulled yet")
    if draft.embeds:
        raise ModelLoadFailed(f"{named} makes embeddings and generates no text")
    if draft.adapter_path is not None:
        raise ModelLoadFailed(f"{named} is an adapter, which draft models cannot have")
    return draft.path


def _ranks(options: LoadOptions, machines: int) -> int:
    """Of a model that so many machines may share, one each. Raises ModelLoadFailed."""
    if options.ranks > machines:
        raise ModelLoadFailed(
            f"its {options.ranks} ranks take a machine each, and {machines} are named for it"
        )
    return options.ranks if options.ranks > 1 else machines


def _check_replicas(entry: ModelEntry, options: LoadOptions, replicas: int, machines: int) -> None:
    """Raises ModelLoadFailed where so many engines cannot be on so many machines."""
    if options.ranks > 1 and not entry.embeds:
        raise ModelLoadFailed("replicas on several machines are not divided among ranks too")
    if replicas > machines:
        raise ModelLoadFailed(
            f"its {replicas} replicas take a machine each, and {machines} are named for it"
        )
    if options.draft_path is not None:
        raise ModelLoadFailed("a draft model cannot guess for replicas on other machines")


def _division(entry: ModelEntry, path: Path, options: LoadOptions) -> Way:
    """As engines do it. Raises ModelLoadFailed where the model cannot be divided, as far as its
    config tells.
    """
    if options.ranks == 1:
        return "tensor"
    if options.draft_path is not None:
        raise ModelLoadFailed("a draft model cannot guess for one that is divided among ranks")
    way, problem = division(read_config(path), options.ranks, options.division)
    if problem is not None:
        raise ModelLoadFailed(problem)
    return way


def _among(replicas: int, ranks: int) -> str:
    parts = [f"{replicas} engines"] if replicas > 1 else []
    parts += [f"{ranks} ranks"] if ranks > 1 else []
    return f" for {' of '.join(parts)}" if parts else ""
