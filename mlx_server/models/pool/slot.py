"""The life of one model in the pool: absent, loading, ready, restarting, draining, failed."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlx_server.config import Settings
from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Device, Embedding, LoadOptions, Memory, PrefixStats, Ready
from mlx_server.errors import InsufficientMemory, LoadCrashed, ModelLoadFailed, ServerError
from mlx_server.events import event
from mlx_server.models.pool.footprint import Footprint, read_embedding_footprint, read_footprint
from mlx_server.models.pool.supervisor import StartEngine, SupervisedEngine
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.embedding_files import EmbeddingFiles, read_embedding
from mlx_server.models.store.locks import ModelLock
from mlx_server.models.text.client import ModelText, TextProcess
from mlx_server.telemetry import load_span
from mlx_server.units import parse_bytes

ModelState = Literal[
    "absent", "downloading", "loading", "ready", "restarting", "draining", "failed"
]
SHOWN_LINES = 20
SHOWN_CHARACTERS = 500
"""Of the end of what an engine wrote, and of a line of it, what an operator is shown."""
SHORTEST_RETRY = 1.0
"""Seconds a client is told to wait at least before it asks again for a model."""
KV_SHARE = 0.25
"""Of the budget: what one model's KV caches get unless the settings say otherwise."""
SMALLEST_KV_TOKENS = 2048
"""A model is not loaded where its KV cache could not hold one sequence of this many tokens."""

log = logging.getLogger("mlx_server.pool")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can generate: its engine for the tokens, its text side for the rest."""

    id: str
    engine: SupervisedEngine
    text: ModelText
    facts: Ready
    lock: ModelLock


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What an operator sees of one model. Times are in seconds, memory in bytes.

    `in_flight` counts the requests that hold the model, `waiting_to_load` those in line for it;
    `need` is the memory reserved for it, or that it would take. `kv_bytes` are the caches of
    running requests, `step_seconds` is what a decode step takes of late. `restarts` counts the
    engines that ended by themselves and were replaced while requests went on; `last_lines` is what
    the last one that so ended, or crashed while it loaded, wrote last.
    """

    id: str
    state: ModelState
    reason: str | None = None
    pid: int | None = None
    device: str | None = None
    context_length: int | None = None
    memory: Memory | None = None
    need: int | None = None
    load_seconds: float | None = None
    loads: int = 0
    restarts: int = 0
    last_lines: tuple[str, ...] = ()
    in_flight: int = 0
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    step_seconds: float = 0.0
    kv_bytes: int = 0
    prefix_cache: PrefixStats | None = None
    waiting_to_load: int = 0
    pinned: bool = False
    last_used: float | None = None
    expires: float | None = None
    """When it will be unloaded if nobody uses it, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a model is promised: its weights, its KV caches, and room to compute."""

    weights: int
    kv: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.working


class Slot:
    """One model's place in the pool, whether it is loaded or not.

    `on_change` is called whenever memory may have become free or a load has ended.
    """

    def __init__(
        self,
        entry: ModelEntry,
        settings: Settings,
        texts: TextProcess,
        on_change: Callable[[], None],
    ) -> None:
        self.entry = entry
        self.settings = settings
        self._texts = texts
        self.model: LoadedModel | None = None
        self.resident = False
        """Whether it was named at the start, and so stays loaded unless room is needed."""
        self.draining = False
        self.unloaders = 0
        """How many wait for its requests to finish, to end it then."""
        self.measuring = False
        self.lost = False
        """Its engine ended by itself and nobody has asked for the model since."""
        self.pinned = False
        self.proven = False
        self.in_use = 0
        self.waiters = 0
        self.failures = 0
        self.loads = 0
        self.restarts = 0
        self.last_lines: tuple[str, ...] = ()
        self.last_used: float | None = None
        self.load_seconds: float | None = None
        self.loaded_at = 0.0
        self.used_at = 0.0
        self.expires_at: float | None = None
        self._on_change = on_change
        self._error: ServerError | None = None
        self._need: Need | None = None
        self._footprint: Footprint | None = None
        self._embedding: EmbeddingFiles | None = None
        self._float32 = False
        self._measured: dict[Footprint, int] = {}
        """What the weights took when they were loaded, by what was estimated of the same files."""
        self._began = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # what others ask of it

    @property
    def loading(self) -> bool:
        return self._loading is not None and not self._loading.done()

    @property
    def ending(self) -> bool:
        return self._ending is not None and not self._ending.done()

    @property
    def idle(self) -> bool:
        """Loaded, used by nobody, and free to be ended."""
        if self.model is None or self.in_use or self.ending or self.pinned:
            return False
        # Those who wait for a model that takes requests are about to have it.
        return self.draining or not self.waiters

    @property
    def interruptible(self) -> bool:
        """Loaded and in use, and free to make room once its requests have finished."""
        if self.model is None or self.ending or self.draining or self.pinned:
            return False
        return self.in_use > 0

    @property
    def leaving(self) -> bool:
        """Loaded, and certain to be gone soon: nobody needs to make that happen."""
        if self.model is None:
            return False
        return self.ending or self.unloaders > 0

    @property
    def holds_memory(self) -> bool:
        return self.loading or self.ending or self.model is not None

    @property
    def need(self) -> int:
        """Bytes reserved for it, or that it would take; 0 as long as that is unknown."""
        return self._need.total if self._need else 0

    @property
    def reason(self) -> str | None:
        """Why it could not be loaded."""
        return self._error.message if self._error else None

    @property
    def state(self) -> ModelState:
        if self.loading:
            return "loading"
        if self.model is None:
            return "failed" if self._error else "absent"
        if self.draining or self.leaving:
            return "draining"
        return "restarting" if self.model.engine.restarting else "ready"

    def status(self) -> ModelStatus:
        known: dict[str, Any] = {
            "id": self.entry.id,
            "state": self.state,
            "reason": self.reason,
            "need": self.need or None,
            "load_seconds": self.load_seconds,
            "loads": self.loads,
            "restarts": self.restarts,
            "last_lines": self.last_lines,
            "in_flight": self.in_use,
            "waiting_to_load": self.waiters,
            "pinned": self.pinned,
            "last_used": self.last_used,
        }
        if self.model is None:
            return ModelStatus(**known)
        facts, stats = self.model.facts, self.model.engine.stats
        if stats is not None:
            known |= {
                "running": stats.running + stats.prefilling,
                "waiting": stats.waiting,
                "preempted": stats.preempted,
                "step_seconds": stats.step_seconds,
                "kv_bytes": stats.kv_bytes,
                "prefix_cache": stats.prefix,
            }
        return ModelStatus(
            **known,
            pid=self.model.engine.pid,
            device=facts.device,
            context_length=facts.context_length,
            memory=stats.memory if stats else facts.memory,
            expires=self._expiry_time(),
        )

    async def changed(self) -> None:
        """Wait until something about the slot has changed."""
        await self._changed.wait()

    # use

    def offer(self) -> LoadedModel | None:
        """The model, if a new request may use it now."""
        return None if self.draining or self.leaving else self.model

    def take(self) -> None:
        """A request begins to use the model."""
        self.in_use += 1
        self.expires_at = None

    def let_go(self, keep_alive: float | None) -> None:
        """A request has ended; the model stays for `keep_alive` seconds, None as the settings say.

        Negative seconds keep it for as long as there is room.
        """
        self.in_use -= 1
        self.last_used = time.time()
        self._notify()
        if self.in_use == 0 and self.model is not None:
            self._begin_idling(self._usual_keep_alive() if keep_alive is None else keep_alive)

    def drain(self) -> None:
        """Take no new request until `resume`."""
        self.draining = True

    def resume(self) -> None:
        """Take requests again."""
        self.draining = False
        self._notify()

    # memory

    async def measure(self, device: Device, budget: int) -> None:
        """Find out what the model needs, from its files or from its last run.

        Raises ModelLoadFailed for damaged files, and InsufficientMemory when the need is beyond
        `budget` bytes.
        """
        if self.holds_memory:
            return
        self.measuring = True
        try:
            await self._measure(device, budget)
        except ServerError as error:
            self.fail(error)
            raise self.failure() from error
        finally:
            self.measuring = False
            self._notify()

    async def _measure(self, device: Device, budget: int) -> None:
        path, mode = self.entry.path, self.settings.dequantize
        if path is None:
            raise ModelLoadFailed("it has not been pulled yet")
        float32 = mode == "always" or (mode == "auto" and device.name == "cpu")
        footprint = await asyncio.to_thread(self._read_footprint, path, float32)
        try:
            self._need = self._needed(footprint, budget)
        except InsufficientMemory:
            if not float32 or mode == "always":
                raise
            # Slower as it is stored, but it runs.
            footprint = await asyncio.to_thread(self._read_footprint, path, False)
            self._need = self._needed(footprint, budget)
        self._float32 = footprint.float32

    def _read_footprint(self, path: Path, float32: bool) -> Footprint:
        if self.entry.embeds:
            self._embedding = read_embedding(path)
            return read_embedding_footprint(path, float32, self._embedding.longest)
        self._embedding = None
        return read_footprint(path, float32, self.entry.adapter_path, self.settings.kv_bits)

    def _needed(self, footprint: Footprint, budget: int) -> Need:
        settings = self.settings
        weights = self._measured.get(footprint, footprint.weights)
        context = min(footprint.context_length, settings.context_length or footprint.context_length)
        full = settings.max_batch * footprint.kv(context)
        share = settings.kv_cache or f"{KV_SHARE:.0%}"
        least = footprint.kv(min(context, SMALLEST_KV_TOKENS))
        working = footprint.working(settings.max_batch)
        if weights + working + least > budget:
            raise InsufficientMemory(
                f"it needs {weights + working + least:,} bytes of memory and all models together "
                f"may take {budget:,}"
            )
        kv = min(full, max(least, parse_bytes(share, budget)), budget - weights - working)
        self._footprint = footprint
        return Need(weights, kv, working)

    # load and end

    def begin_loading(self) -> None:
        """Start to load; what comes of it shows in `model` or `reason`."""
        self._began = time.monotonic()
        self._error = None
        self.lost = False
        self.loads += 1
        self._loading = asyncio.create_task(self._load(), name=f"load {self.entry.id}")

    def begin_ending(self) -> None:
        """Start to end the engine and give its memory back."""
        if self.model is not None and not self.ending:
            self._ending = asyncio.create_task(self._end(self.model), name=f"end {self.entry.id}")

    async def unload(self) -> None:
        """Let requests finish, then end the engine. It stays if this is cancelled before that."""
        model = self.model
        if model is None:
            return
        self.unloaders += 1
        try:
            while self.in_use and self.model is model:
                await self.changed()
        finally:
            self.unloaders -= 1
            self._notify()
        if self.model is model:
            self.begin_ending()
        if self._ending is not None:
            await asyncio.wait([self._ending])  # which goes on if this is cancelled

    async def stop(self) -> None:
        """Give up a load under way and end the engine at once."""
        tasks = [task for task in (self._loading, self._ending, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        model, self.model = self.model, None
        if model is not None:
            await model.engine.stop()
            model.lock.release()
        self._notify()

    def fail(self, error: ServerError) -> None:
        """Tell those who wait that the model cannot be loaded."""
        self._error = error
        if isinstance(error, LoadCrashed):
            self._note_last(error.last_lines)
        self.failures += 1
        self.proven = False
        log.error(event("model_load_failed", model=self.entry.id, reason=error.message))
        self._notify()

    def failure(self) -> ServerError:
        """What to tell a request for a model that could not be loaded."""
        error = self._error or ModelLoadFailed("unknown reason")
        kind = InsufficientMemory if isinstance(error, InsufficientMemory) else ModelLoadFailed
        return kind(
            f"The model `{self.entry.id}` could not be loaded: {error.message}",
            param="model",
            retry_after=SHORTEST_RETRY,
        )

    def remaining_load_seconds(self) -> float:
        """A guess at how much longer a load takes, from the last one."""
        elapsed = time.monotonic() - self._began if self.loading else 0.0
        usual = self.load_seconds if self.load_seconds is not None else 2 * elapsed
        return max(SHORTEST_RETRY, usual - elapsed)

    async def _load(self) -> None:
        try:
            with load_span(self.entry.id) as span:
                async with asyncio.timeout(self.settings.load_timeout):
                    model = await self._start()
                span.loaded(device=model.facts.device, weights_bytes=model.facts.weights_bytes)
        except Exception as error:  # noqa: BLE001
            # Whatever is wrong with a model folder, those who wait must hear of it.
            self.fail(self._problem(error))
        else:
            self._loaded(model)
        finally:
            # By the next turn of the loop this task is done and the slot's memory is free again.
            asyncio.get_running_loop().call_soon(self._on_change)

    def _problem(self, error: Exception) -> ServerError:
        """Why an engine could not be started, for those who wait."""
        match error:
            case ServerError():
                return error
            case TimeoutError():
                seconds = self.settings.load_timeout
                return ModelLoadFailed(f"it did not load within {seconds:g} seconds")
            case OSError():
                return ModelLoadFailed(f"its engine could not be started: {error}")
        log.error(event("model_load_crashed", model=self.entry.id), exc_info=error)
        return ModelLoadFailed(f"{type(error).__name__}: {error}")

    def _loaded(self, model: LoadedModel) -> None:
        self.model = model
        self.draining = False
        self.proven = True
        self.loaded_at = time.monotonic()
        self.load_seconds = self.loaded_at - self._began
        self._begin_idling(self._usual_keep_alive())
        self._correct_need(model.facts)
        log.info(
            event(
                "model_loaded",
                model=self.entry.id,
                pid=model.facts.pid,
                device=model.facts.device,
                seconds=self.load_seconds,
                weights_bytes=model.facts.weights_bytes,
                reserved_bytes=self.need,
            )
        )
        self._watch = asyncio.create_task(self._look_after(model), name=f"watch {self.entry.id}")
        self._notify()

    def _correct_need(self, facts: Ready) -> None:
        """Replace estimates by what was measured, never beyond what the engine was allowed."""
        if self._need is None or self._footprint is None:
            return
        self._measured[self._footprint] = facts.weights_bytes
        left = self._need.total - facts.weights_bytes - facts.kv_limit
        working = max(0, min(self._need.working, left))
        self._need = Need(facts.weights_bytes, facts.kv_limit, working)

    async def _start(self) -> LoadedModel:
        path = self.entry.path
        if path is None or self._need is None:
            raise ModelLoadFailed("it has not been pulled yet")
        options = msgspec.structs.replace(
            self.settings.load_options(self.entry.id),
            memory_limit=str(self._need.total),
            kv_limit=self._need.kv,
            dequantize="always" if self._float32 else "never",
        )
        embedding = None
        if self._embedding is not None:
            embedding = self._embedding.embedding
            options = _limited(options, self._embedding.longest)
        lock = ModelLock(self.settings.home, path)
        start = partial(self._start_engine, path, options, self.entry.adapter_path, embedding)
        try:
            engine, text = await self._start_both(start, path, options)
        except BaseException:
            lock.release()
            raise
        assert engine.ready is not None
        supervised = SupervisedEngine(engine, start, self.settings.hang_timeout)
        return LoadedModel(self.entry.id, supervised, text, engine.ready, lock)

    async def _start_engine(
        self,
        path: Path,
        options: LoadOptions,
        adapter_path: Path | None,
        embedding: Embedding | None,
        kv_share: float,
    ) -> EngineClient:
        options = msgspec.structs.replace(options, kv_share=kv_share)
        async with asyncio.timeout(self.settings.load_timeout):
            return await EngineClient.start(self.entry.id, path, options, adapter_path, embedding)

    async def _start_both(
        self, start: StartEngine, path: Path, options: LoadOptions
    ) -> tuple[EngineClient, ModelText]:
        """Load text side and engine side at once; neither is left behind when the other fails."""
        starting = asyncio.ensure_future(start(1.0))
        text = asyncio.create_task(self._texts.open(path, self.entry.id, options.trust_remote_code))
        try:
            return await asyncio.gather(starting, text)
        except BaseException:
            starting.cancel()
            text.cancel()
            engine, _ = await asyncio.gather(starting, text, return_exceptions=True)
            if isinstance(engine, EngineClient):
                await engine.kill()
            raise

    async def _end(self, model: LoadedModel) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self.model is not model:  # it ended by itself just before
            return
        await model.engine.stop()
        self._gone(model)
        log.info(event("model_unloaded", model=self.entry.id, pid=model.facts.pid))

    async def _look_after(self, model: LoadedModel) -> None:
        """Replace the engine whenever it ends by itself, as long as somebody uses the model."""
        while self.model is model:
            await model.engine.ended()
            self._note_last(model.engine.last_lines)
            if self.in_use:
                await self._restart(model)
            else:
                self.lost = True
                self.proven = False
                self._gone(model)

    async def _restart(self, model: LoadedModel) -> None:
        """Give the model another engine; without one its requests fail."""
        try:
            await model.engine.restart()
        except Exception as error:  # noqa: BLE001
            # Whatever it is, those who wait must hear of it.
            self.fail(self._problem(error))
            model.engine.fail(self.failure())
            self._gone(model)
        else:
            self.restarts += 1
            self._notify()

    def _note_last(self, lines: Sequence[str]) -> None:
        self.last_lines = tuple(line[:SHOWN_CHARACTERS] for line in lines[-SHOWN_LINES:])

    def _gone(self, model: LoadedModel) -> None:
        """The engine has ended and its memory is free."""
        model.lock.release()
        model.text.close()
        self.model = None
        self.draining = False
        self.expires_at = None
        self._notify()
        asyncio.get_running_loop().call_soon(self._on_change)

    def _usual_keep_alive(self) -> float:
        """Seconds that it stays loaded unused; negative for as long as there is room."""
        kept = self.pinned or self.resident
        seconds = None if kept else self.settings.keep_alive_of(self.entry.id)
        return -1.0 if seconds is None else seconds

    def _begin_idling(self, keep_alive: float) -> None:
        self.used_at = time.monotonic()
        expires = keep_alive >= 0 and not self.pinned
        self.expires_at = self.used_at + keep_alive if expires else None

    def _expiry_time(self) -> float | None:
        if self.expires_at is None:
            return None
        return time.time() + self.expires_at - time.monotonic()

    def _notify(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()


def _limited(options: LoadOptions, longest: int | None) -> LoadOptions:
    """`options` for a model that takes texts of up to `longest` tokens."""
    limits = [limit for limit in (options.context_length, longest) if limit is not None]
    return msgspec.structs.replace(options, context_length=min(limits, default=None))
