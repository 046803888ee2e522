"""The models that are loaded: one engine process each, shared by all requests for it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from mlx_server.config import Settings
from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Memory, Ready
from mlx_server.errors import ModelLoadFailed, ModelLoading, ServerError, Unavailable
from mlx_server.models.catalog import Catalog, ModelEntry
from mlx_server.models.text.client import ModelText, TextProcess
from mlx_server.telemetry import event, load_span

ModelState = Literal["absent", "loading", "ready", "failed"]
SHORTEST_RETRY = 1.0
"""Seconds a client is told to wait at least before it asks again for a loading model."""

log = logging.getLogger("mlx_server.pool")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can generate: its engine for the tokens, its text side for the rest."""

    id: str
    engine: EngineClient
    text: ModelText
    facts: Ready


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What an operator sees of one model. Times are in seconds, memory in bytes."""

    id: str
    state: ModelState
    reason: str | None = None
    pid: int | None = None
    device: str | None = None
    context_length: int | None = None
    memory: Memory | None = None
    load_seconds: float | None = None
    in_flight: int = 0
    running: int = 0
    waiting: int = 0
    last_used: float | None = None


class ModelPoolManager:
    """Loads models on demand, shares them, and ends their engines.

    `acquire` is the one way to a model.
    """

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self.settings = settings
        self.catalog = catalog
        self._texts = TextProcess(settings.prompt_timeout)
        self._slots: dict[str, _Slot] = {}
        self._wanted: list[str] = []
        self._stopping = False

    async def start(self, models: list[str]) -> None:
        """Begin to load `models` in the background and keep them loaded from now on."""
        for model_id in models:
            slot = await self._slot(model_id)
            slot.keep = True
            self._wanted.append(slot.entry.id)
            slot.begin_loading()

    async def stop(self) -> None:
        """End every engine. Loads under way are given up."""
        self._stopping = True
        await asyncio.gather(*(slot.stop() for slot in self._slots.values()))
        await self._texts.kill()

    @property
    def ready(self) -> bool:
        """Whether all models named at the start can generate."""
        return not self._stopping and all(self._slots[id_].model for id_ in self._wanted)

    @property
    def not_ready_reason(self) -> str | None:
        """Which models cannot generate yet, and why; None when all can."""
        if self._stopping:
            return "The server is stopping."
        missing = [slot for id_ in self._wanted if (slot := self._slots[id_]).model is None]
        if not missing:
            return None
        return " ".join(
            f"Model `{slot.entry.id}` is {slot.state}"
            + (f": {slot.reason}" if slot.reason else ".")
            for slot in missing
        )

    def statuses(self) -> list[ModelStatus]:
        """The models that were asked for since the start."""
        return [slot.status() for slot in self._slots.values()]

    @asynccontextmanager
    async def acquire(self, model_id: str) -> AsyncIterator[LoadedModel]:
        """The model of that id or alias, loaded and kept loaded as long as the block lasts.

        Raises ModelNotFound, ModelLoading when it does not load within `settings.load_wait`
        seconds, and ModelLoadFailed.
        """
        if self._stopping:
            raise Unavailable("The server is stopping.", retry_after=SHORTEST_RETRY)
        slot = await self._slot(model_id)
        model = slot.model
        if model is None or not model.engine.alive:
            model = await self._loaded(slot)
        slot.in_use += 1
        try:
            yield model
        finally:
            slot.in_use -= 1
            slot.last_used = time.time()

    async def _slot(self, model_id: str) -> "_Slot":
        entry = await asyncio.to_thread(self.catalog.find, model_id)
        if entry.id not in self._slots:
            self._slots[entry.id] = _Slot(entry, self.settings, self._texts)
        return self._slots[entry.id]

    async def _loaded(self, slot: "_Slot") -> LoadedModel:
        """Wait for the load that is under way, or begin one."""
        wait = self.settings.load_wait
        loading = slot.begin_loading()
        done, _ = await asyncio.wait([loading], timeout=wait)
        if not done:
            raise ModelLoading(
                f"The model `{slot.entry.id}` is still loading after {wait:g} seconds. "
                "The load goes on; ask again.",
                retry_after=slot.remaining_load_seconds(),
            )
        if slot.model is None:
            raise ModelLoadFailed(
                f"The model `{slot.entry.id}` could not be loaded: {slot.reason}",
                retry_after=SHORTEST_RETRY,
            )
        return slot.model


class _Slot:
    """One model's place in the pool, whether it is loaded or not."""

    def __init__(self, entry: ModelEntry, settings: Settings, texts: TextProcess) -> None:
        self.entry = entry
        self.settings = settings
        self.texts = texts
        self.keep = False
        self.model: LoadedModel | None = None
        self.reason: str | None = None
        self.in_use = 0
        self.last_used: float | None = None
        self.load_seconds: float | None = None
        self._loading: asyncio.Task[None] | None = None
        self._began = 0.0
        self._watch: asyncio.Task[None] | None = None

    @property
    def state(self) -> ModelState:
        if self.model is not None:
            return "ready"
        if self._loading is not None and not self._loading.done():
            return "loading"
        return "failed" if self.reason else "absent"

    def begin_loading(self) -> asyncio.Task[None]:
        """The load under way, or a new one. It never raises: `model` or `reason` tells."""
        if self._loading is None or self._loading.done():
            self._began = time.monotonic()
            self._loading = asyncio.create_task(self._load(), name=f"load {self.entry.id}")
        return self._loading

    def remaining_load_seconds(self) -> float:
        """A guess at how much longer the load under way takes."""
        elapsed = time.monotonic() - self._began
        usual = self.load_seconds if self.load_seconds is not None else 2 * elapsed
        return max(SHORTEST_RETRY, usual - elapsed)

    def status(self) -> ModelStatus:
        if self.model is None:
            return ModelStatus(
                self.entry.id, self.state, self.reason, load_seconds=self.load_seconds
            )
        engine, facts, stats = self.model.engine, self.model.facts, self.model.engine.stats
        return ModelStatus(
            id=self.entry.id,
            state=self.state,
            pid=facts.pid,
            device=facts.device,
            context_length=facts.context_length,
            memory=stats.memory if stats else facts.memory,
            load_seconds=self.load_seconds,
            in_flight=engine.in_flight,
            running=stats.running + stats.prefilling if stats else 0,
            waiting=stats.waiting if stats else 0,
            last_used=self.last_used,
        )

    async def stop(self) -> None:
        """Give up a load under way and end the engine."""
        self.keep = False
        tasks = [task for task in (self._loading, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        model, self.model = self.model, None
        if model is not None:
            await model.engine.stop()

    async def _load(self) -> None:
        self.reason = None
        try:
            with load_span(self.entry.id):
                async with asyncio.timeout(self.settings.load_timeout):
                    self.model = await self._start()
        except TimeoutError:
            self.reason = f"not loaded within {self.settings.load_timeout:g} seconds"
        except ServerError as error:
            self.reason = error.message
        except OSError as error:
            self.reason = f"its engine could not be started: {error}"
        if self.model is None:
            log.error(event("model_load_failed", model=self.entry.id, reason=self.reason))
            return
        self.load_seconds = time.monotonic() - self._began
        log.info(
            event(
                "model_loaded",
                model=self.entry.id,
                pid=self.model.facts.pid,
                device=self.model.facts.device,
                seconds=self.load_seconds,
                weights_bytes=self.model.facts.weights_bytes,
            )
        )
        self._watch = asyncio.create_task(self._await_end(self.model))

    async def _start(self) -> LoadedModel:
        """Load text side and engine side at once; neither is left behind when the other fails."""
        path = self.entry.path
        if path is None:
            raise ModelLoadFailed("it has not been pulled yet")
        options = self.settings.load_options(self.entry.id)
        trusted = options.trust_remote_code
        opening = asyncio.create_task(self.texts.open(path, self.entry.id, trusted))
        engine: EngineClient | None = None
        try:
            engine = await EngineClient.start(self.entry.id, path, options)
            text = await opening
        except BaseException:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            if engine is not None:
                await engine.kill()
            raise
        assert engine.ready is not None
        return LoadedModel(self.entry.id, engine, text, engine.ready)

    async def _await_end(self, model: LoadedModel) -> None:
        """Notice that the engine ended by itself, and replace it if it is to be kept."""
        await model.engine.closed.wait()
        log.error(event("engine_ended", model=model.id, pid=model.facts.pid))
        model.text.close()
        if self.model is model:
            self.model = None
        await model.engine.kill()
        if self.keep:
            self.begin_loading()
