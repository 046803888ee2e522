"""From a load message to a model that can compute: device, weights, caches, scheduler.

What needs MLX is imported late: a BLAS has to be loaded before it.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from mlx_server.engine.cpu.blas import ADVICE, load_openblas
from mlx_server.engine.protocol import Embedding, Load, LoadOptions, Nccl, Ready
from mlx_server.engine.ranks.messages import Join, Loaded, Settled
from mlx_server.engine.run.cuda import keep_prepared
from mlx_server.engine.run.patches import leave_out_text_side
from mlx_server.engine.spawn import give_way
from mlx_server.units import parse_bytes

if TYPE_CHECKING:
    from mlx_server.engine.cache.blocks import Charge
    from mlx_server.engine.cache.disk import DiskCache
    from mlx_server.engine.cache.prefix import PrefixCache
    from mlx_server.engine.cpu.threads import BlasThreads
    from mlx_server.engine.embedding.embedder import Embedder
    from mlx_server.engine.memory import DeviceMemory
    from mlx_server.engine.ranks.followers import Followers
    from mlx_server.engine.ranks.messages import Loaded
    from mlx_server.engine.ranks.sharing import Ranks
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.schedule.scheduler import Scheduler

log = logging.getLogger("mlx_server.engine")


def load(
    message: Load, followers: "Followers | None" = None
) -> "tuple[Scheduler | Embedder, Ready]":
    """Load the model that `message` names, together with `followers` if it is divided.

    Raises ModelError when the folder does not hold a model that can run.
    """
    started = time.perf_counter()
    memory, blas = prepare(message)
    work: Scheduler | Embedder
    width, mixed_steps, batching, own_head = 0, None, None, False
    if message.embedding is None:
        work = _scheduler(message, memory, followers)
        mixed_steps, batching = work.model.mixed_steps, work.model.batching
        own_head = work.model.head is not None
        models = [one for one in (work.model, work.draft, work.model.head) if one is not None]
        weights = [size for model in models for size in array_sizes_of(model.model)]
        whole = sum(model.weights_bytes for model in models)
        weights_bytes = work.model.largest_part if work.model.layered else whole
    else:
        work = _embedder(message, message.embedding, memory)
        width = work.model.width
        weights = array_sizes_of(work.model.model)
        weights_bytes = sum(weights)
    backend = work.model
    memory.wiring.hold(weights)
    work.warm_up()
    ready = Ready(
        pid=os.getpid(),
        device=memory.device.name,
        model_type=backend.model_type,
        context_length=backend.context_length,
        vocab_size=backend.vocab_size,
        weights_bytes=weights_bytes,
        kv_limit=work.kv_limit,
        longest_sequence=work.longest_sequence,
        load_seconds=time.perf_counter() - started,
        dequantized=backend.dequantized,
        blas=blas,
        memory=memory.read(),
        width=width,
        mixed_steps=mixed_steps,
        batching=batching,
        own_head=own_head,
    )
    return work, ready


def is_models_fault(error: Exception) -> bool:
    """Whether a failed load would fail again. Else it may come of another rank's end."""
    from mlx_server.engine.ranks.ring import NoFabric
    from mlx_server.engine.run.weights import ModelError

    return isinstance(error, ModelError | NoFabric)


def prepare(message: Load) -> "tuple[DeviceMemory, str | None]":
    """What comes before MLX is imported, and the limits of its memory; also which BLAS it has."""
    options = message.options
    if options.ranks > 1 and not message.hosts:
        # On one machine: threads that outnumber processors wait for each other.
        threads = max(1, (os.cpu_count() or 1) // options.ranks)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    blas = load_openblas(options.openblas)
    keep_prepared(Path(options.kernels_folder) if options.kernels_folder else None)
    if not options.trust_remote_code:  # a model's own code may well read text
        leave_out_text_side()
    return _memory(options, blas), blas


def _memory(options: LoadOptions, blas: str | None) -> "DeviceMemory":
    from mlx_server.engine.memory import DeviceMemory

    memory = DeviceMemory(options.memory_limit, options.cache_limit, options.wired_limit)
    if memory.device.name == "cpu":
        give_way()
        if sys.platform.startswith("linux"):
            log.info("event=blas library=%s%s", blas, "" if blas else f' advice="{ADVICE}"')
    return memory


def blas_threads() -> "BlasThreads | None":
    """Of this process, where MLX computes on a CPU; for when it is loaded."""
    from mlx_server.engine.cpu.threads import BlasThreads
    from mlx_server.engine.memory import device_name

    return BlasThreads() if device_name() == "cpu" else None


def array_sizes_of(model: Any) -> list[int]:
    from mlx_server.engine.run.weights import array_sizes

    return array_sizes(model)


def _scheduler(message: Load, memory: "DeviceMemory", followers: "Followers | None") -> "Scheduler":
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.schedule.scheduler import Scheduler

    options = message.options
    adapter = Path(message.adapter_path) if message.adapter_path else None
    path, draft = Path(message.path), None
    if followers is None:
        backend = Backend(path, options, memory, adapter)
        if options.draft_path is not None and options.speculation == "auto":
            draft = load_draft(Path(options.draft_path), backend, options, memory)
        kv_limit = _kv_limit(options, memory, backend, draft, [])
    else:
        backend = Backend(path, options, memory, adapter, _ranks(message, followers))
        others = followers.loaded()
        backend.kv_cost = backend.kv_cost.or_more(one.cost for one in others)
        kv_limit = _kv_limit(options, memory, backend, None, others)
    charge = _charge(backend)
    prefix = _prefix_cache(message, backend, kv_limit, charge)
    if followers is not None:
        longest = backend.kv_cost.longest(kv_limit, backend.context_length)
        block, snapshot = (charge.block, charge.snapshot) if charge else (0, 0)
        followers.tell(Settled(longest, prefix.limit, block, snapshot))
    return Scheduler(
        backend,
        memory,
        prefix,
        max_batch=options.max_batch,
        kv_limit=kv_limit,
        prefill_chunk=options.prefill_chunk,
        kv_share=options.kv_share,
        draft=draft,
    )


def load_draft(
    path: Path, backend: "Backend", options: LoadOptions, memory: "DeviceMemory"
) -> "Backend":
    """The model in folder `path`, to guess tokens for `backend`. Raises ModelError.

    Code of its own it may not run.
    """
    from mlx_server.engine.run import kv
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.run.vocabulary import mismatch
    from mlx_server.engine.run.weights import ModelError

    named = f"the draft model in {path.name} cannot guess for it"
    if not backend.guesses:
        raise ModelError(f"{named}: its own KV caches cannot be shortened")
    try:
        draft = Backend(path, structs.replace(options, trust_remote_code=False), memory)
    except ModelError as error:
        raise ModelError(f"the draft model in {path.name} cannot be loaded: {error}") from error
    if not (draft.guesses and kv.can_shorten(draft.caches.merge([draft.new_cache()]))):
        raise ModelError(f"{named}: the draft's KV caches cannot be shortened")
    if reason := mismatch(backend.path, path, min(backend.vocab_size, draft.vocab_size)):
        raise ModelError(f"{named}: {reason}")
    return draft


def _ranks(message: Load, followers: "Followers") -> "Ranks":
    """Raises ModelError, RingError."""
    import mlx.core as mx

    from mlx_server.engine.ranks import ring
    from mlx_server.engine.ranks.sharing import Leading
    from mlx_server.engine.run.weights import ModelError

    options, fabric = message.options, message.fabric
    if fabric is None and options.ranks_over == "nccl":
        fabric = Nccl()
    here = 1 if message.hosts else options.ranks
    if isinstance(fabric, Nccl) and (gpus := mx.device_count(mx.gpu)) < here:
        raise ModelError(
            f"over NCCL each rank takes a GPU, and this machine has {gpus} for {here} of them"
        )
    prepared = followers.ready()
    if message.hosts:
        own = ring.free_addresses(message.hosts[0].addresses)
        ranks = [own, *(one.addresses for one in prepared)]
    else:
        ranks = [[one] for one in ring.free_addresses([ring.LOOPBACK] * options.ranks)]
    join = Join(ranks, fabric)
    group = ring.join(0, ranks, fabric, announce=lambda: followers.tell(join))
    return Leading(group, followers)


def _embedder(message: Load, embedding: Embedding, memory: "DeviceMemory") -> "Embedder":
    from mlx_server.engine.embedding.backend import EmbeddingBackend
    from mlx_server.engine.embedding.embedder import Embedder
    from mlx_server.engine.run.weights import ModelError

    if message.adapter_path is not None:
        raise ModelError("LoRA adapters are not applied to embedding models")
    backend = EmbeddingBackend(Path(message.path), message.options, memory, embedding)
    return Embedder(backend, memory)


def _charge(backend: "Backend") -> "Charge | None":
    """What blocks of the prefix cache count for in all ranks, where they have other layers."""
    from mlx_server.engine.cache.blocks import Charge
    from mlx_server.engine.cache.prefix import BLOCK

    if not backend.layered:
        return None
    return Charge(backend.kv_cost.of_block(BLOCK), backend.kv_cost.of_snapshot())


def _prefix_cache(
    message: Load, backend: "Backend", kv_limit: int, charge: "Charge | None"
) -> "PrefixCache":
    from mlx_server.engine.cache.prefix import PrefixCache

    options = message.options
    limit = parse_bytes(options.prefix_cache, kv_limit)
    if backend.layout.obstacle is not None:
        log.info("event=prefix_cache_off reason=%s", backend.layout.obstacle)
        limit = 0
    disk = disk_cache(message, backend) if limit > 0 else None
    return PrefixCache(backend.layout, limit, disk, charge)


def disk_cache(message: Load, backend: "Backend") -> "DiskCache | None":
    """Of this process's part of the model; None where none is wanted."""
    from mlx_server.engine.cache.disk import DiskCache
    from mlx_server.engine.cache.identity import model_identity

    options, ranks = message.options, backend.ranks
    if options.disk_cache_folder is None:
        return None
    way = "layers" if backend.layered else "heads"
    part = f"{way} {ranks.rank} of {ranks.size}" if ranks.size > 1 else ""
    identity = model_identity(message, backend.layout.describe(), part)
    folder, limit = Path(options.disk_cache_folder), options.disk_cache_limit
    return DiskCache(folder, identity, limit, options.disk_cache_daily)


def _kv_limit(
    options: LoadOptions,
    memory: "DeviceMemory",
    backend: "Backend",
    draft: "Backend | None",
    others: list[Loaded],
) -> int:
    """Bytes that KV caches may take, in each rank: `others` is what those besides this one say.

    Raises ModelError when that leaves room for no request.
    """
    beside = draft or backend.head
    weights = backend.weights_bytes + (beside.weights_bytes if beside else 0)
    cost = backend.kv_cost.beside(beside.kv_cost) if beside else backend.kv_cost
    left = min([memory.limit - weights, *(one.left for one in others)])
    limit = left if options.kv_limit is None else min(options.kv_limit, left)
    if cost.longest(limit, backend.context_length) == 0:
        from mlx_server.engine.run.weights import ModelError

        raise ModelError(
            f"its weights take {weights:,} of the {memory.limit:,} bytes that it may "
            "use, which leaves too little for a KV cache"
        )
    return limit
