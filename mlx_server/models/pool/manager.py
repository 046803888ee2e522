"""The pool of loaded models; `acquire` is the one way to a model."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

from mlx_server.config import Settings
from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Device
from mlx_server.errors import (
    BadRequest,
    ModelLoadFailed,
    ModelLoading,
    ModelNotFound,
    ServerError,
    Unavailable,
)
from mlx_server.events import event
from mlx_server.models.hosts.machines import Machines
from mlx_server.models.pool.arranger import Arranger
from mlx_server.models.pool.device import find_device
from mlx_server.models.pool.loading import LoadedModel, ModelLoader, StartEngine
from mlx_server.models.pool.needs import MemoryPlanner
from mlx_server.models.pool.slot import MIN_RETRY_AFTER, Slot
from mlx_server.models.pool.status import (
    ModelStatus,
    not_ready_reason,
    retry_after,
    state_of,
    status_of,
)
from mlx_server.models.store.catalog import Catalog, ModelEntry
from mlx_server.models.store.embedding_files import MODULES
from mlx_server.models.text.client import TextProcess

Purpose = Literal["generate", "embed", "rank", "any"]
DEFAULT = "default"
"""The alias for requests that name no model."""

log = logging.getLogger("mlx_server.pool")


class ModelPoolManager:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        *,
        texts: TextProcess | None = None,
        start_engine: StartEngine = EngineClient.start,
        find_device: Callable[[], Awaitable[Device]] = find_device,
    ) -> None:
        self.settings = settings
        self.catalog = catalog
        self._find_device = find_device
        self._texts = texts or TextProcess(settings.prompt_timeout, settings.stable_prompts)
        self.planner = MemoryPlanner(settings.kv_cache)
        self.machines = Machines(settings)
        loader = ModelLoader(
            home=settings.home,
            load_timeout=settings.load_timeout,
            hang_timeout=settings.hang_timeout,
            texts=self._texts,
            start_engine=start_engine,
            model_sampling=settings.model_sampling,
            machines=self.machines,
        )
        self._slots: dict[str, Slot] = {}
        self._arranger = Arranger(self._slots, self.planner, loader, settings.swap_interval)
        self._stopping = False
        self.device: Device | None = None
        """Known once started."""

    async def start(self, models: list[str]) -> None:
        """Begin to load `models` in the background. Raises Unavailable if MLX is unusable, or the
        address where workers join.
        """
        self.device = device = await self._find_device()
        self.planner.use(device, self.settings.memory_limit, self.settings.wired_memory)
        log.info(
            event(
                "budget",
                device=device.name,
                memory=device.memory,
                usable=device.usable,
                bytes=self.planner.budget,
                wirable=self.planner.wirable,
            )
        )
        await self.machines.start(device)
        for name in self.settings.pinned:
            (await self._slot(name)).pinned = True
        for model_id in models:
            slot = await self._slot(model_id)
            slot.preloaded = True
            with contextlib.suppress(ServerError):  # kept for `not_ready_reason`
                await self._plan(slot)
                self._arranger.enqueue(slot)

    async def stop(self) -> None:
        self._stopping = True
        await self._arranger.stop()
        await self._texts.kill()
        await self.machines.stop()

    @property
    def not_ready_reason(self) -> str | None:
        if self._stopping:
            return "The server is stopping."
        return not_ready_reason(self._slots.values())

    async def start_failure(self) -> str | None:
        """Wait for the models named at the start; why they failed to load if they all did."""
        named = [slot for slot in self._slots.values() if slot.preloaded]
        for slot in named:
            while not (slot.proven or slot.failures):
                await slot.changed.wait()
        return None if any(slot.proven for slot in named) else not_ready_reason(named)

    def statuses(self) -> list[ModelStatus]:
        return [status_of(slot) for slot in self._slots.values()]

    @asynccontextmanager
    async def acquire(
        self, model_id: str, keep_alive: float | None = None, purpose: Purpose = "generate"
    ) -> AsyncIterator[LoadedModel]:
        """The model by id or alias, or for "" the one that is loaded; kept loaded during the block
        and `keep_alive` seconds after (negative: while there is room; None: per settings). Raises
        ModelNotFound, BadRequest for a model that does not serve `purpose`, ModelLoading after
        `settings.load_wait` seconds, ModelLoadFailed, and InsufficientMemory if it can never fit.
        """
        named = model_id or _model_meant(self._slots.values(), purpose, self.settings.aliases)
        slot = await self._slot(named)
        _check_purpose(slot.entry, purpose)
        model = slot.available or await self._wait_for(slot, self.settings.load_wait)
        slot.acquire()
        if self._arranger.line:
            self._arranger.arrange()
        try:
            yield model
        finally:
            slot.release(keep_alive, time.monotonic())
            self._arranger.arrange()

    async def load(self, model_id: str, draft_model: str | None = None) -> ModelStatus:
        """Wait without a limit of our own. Raises as `acquire`.

        `draft_model` counts from now on, empty for none; None as it was.
        """
        slot = await self._slot(model_id)
        if draft_model is not None:
            await self._choose_draft(slot, draft_model)
        if slot.available is None:
            await self._wait_for(slot, self.settings.load_timeout)
        return status_of(slot)

    async def unload(self, model_id: str) -> ModelStatus:
        """Finish the model's requests, then end it. Raises BadRequest while it loads. Cancelled
        while requests run, it stays loaded.
        """
        slot = await self._slot(model_id)
        if slot.phase == "loading":
            raise BadRequest(f"The model `{slot.entry.id}` is still loading.", param="model")
        model = slot.model
        try:
            if model is not None:
                await self._unload(slot, model)
        finally:
            self._arranger.arrange()
        return status_of(slot)

    async def reread_entries(self) -> None:
        """The catalog's names and folders have changed. What is loaded stays."""
        for slot in list(self._slots.values()):
            try:
                slot.entry = await asyncio.to_thread(self.catalog.find, slot.entry.id)
            except ServerError:
                slot.entry = replace(slot.entry, aliases=())

    async def pin(self, model_id: str, pinned: bool) -> ModelStatus:
        """Whether it stays in memory, once it is there, when others need room."""
        slot = await self._slot(model_id)
        slot.pin(pinned, time.monotonic())
        self._arranger.arrange()
        return status_of(slot)

    async def _choose_draft(self, slot: Slot, name: str) -> None:
        """Raises ModelNotFound, and BadRequest where the model is there with another, or none may
        guess.
        """
        if name and self.settings.speculation == "off":
            raise BadRequest("The setting `speculation` is off.", param="draft_model")
        draft = (await asyncio.to_thread(self.catalog.find, name)).id if name else None
        present = slot.plan.draft if slot.plan else None
        if slot.holds_memory and (present and present.id) != draft:
            beside = f"the draft model `{present.id}`" if present else "no draft model"
            raise BadRequest(
                f"The model `{slot.entry.id}` is loaded with {beside}; unload it first.",
                param="draft_model",
            )
        slot.draft_model = name

    async def _unload(self, slot: Slot, model: LoadedModel) -> None:
        slot.unloaders += 1
        try:
            while slot.in_use and slot.model is model:
                await slot.changed.wait()
        finally:
            slot.unloaders -= 1
            slot.changed.notify()
        if slot.model is model and slot.phase == "loaded":
            self._arranger.end(slot)
        while slot.model is model:
            await slot.changed.wait()

    async def _slot(self, model_id: str) -> Slot:
        if self._stopping:
            raise Unavailable("The server is stopping.", retry_after=MIN_RETRY_AFTER)
        if (loaded := _loaded(self._slots.values(), model_id)) is not None:
            return loaded
        entry = await asyncio.to_thread(self.catalog.find, model_id)
        slot = self._slots.get(entry.id)
        if slot is None:
            slot = Slot(entry, self.settings.keep_alive_of(entry.id))
            self._slots[entry.id] = slot
        slot.entry = entry  # its folder may have changed
        return slot

    async def _wait_for(self, slot: Slot, seconds: float) -> LoadedModel:
        if slot.waiters >= self.settings.max_load_waiters:
            raise ModelLoading(
                f"{slot.waiters} requests wait for the model `{slot.entry.id}` already.",
                retry_after=retry_after(slot, time.monotonic()),
            )
        slot.waiters += 1
        try:
            async with asyncio.timeout(seconds):
                return await self._until_loaded(slot)
        except TimeoutError as error:
            raise ModelLoading(
                f"The model `{slot.entry.id}` is not loaded after {seconds:g} seconds "
                f"({state_of(slot)}). Ask again.",
                retry_after=retry_after(slot, time.monotonic()),
            ) from error
        finally:
            slot.waiters -= 1
            # Once the caller uses the model or is gone.
            asyncio.get_running_loop().call_soon(self._arranger.arrange)

    async def _until_loaded(self, slot: Slot) -> LoadedModel:
        failures = slot.failures
        while (model := slot.available) is None:
            if slot.failures > failures:
                raise slot.failure()
            if self._stopping:
                raise Unavailable("The server is stopping.", retry_after=MIN_RETRY_AFTER)
            loading = slot in self._arranger.line or slot.phase == "loading"
            if loading or slot.measuring or slot.leaving:
                await slot.changed.wait()
            else:
                await self._plan(slot)
                self._arranger.enqueue(slot)
        return model

    async def _plan(self, slot: Slot) -> None:
        if slot.holds_memory:
            return
        slot.measuring = True
        options = self.settings.load_options(slot.entry.id)
        replicas = self.settings.replicas_of(slot.entry.id)
        hosts = self.machines.of_model(slot.entry.id)
        try:
            draft = await asyncio.to_thread(self._draft_of, slot)
            slot.plan = await asyncio.to_thread(
                self.planner.plan, slot.entry, options, replicas, draft, hosts
            )
        except ServerError as error:
            slot.fail(error)
            raise slot.failure() from error
        finally:
            slot.measuring = False
            slot.changed.notify()

    def _draft_of(self, slot: Slot) -> ModelEntry | None:
        """A model needs no guesses of its own, and one that makes vectors none at all."""
        name = slot.draft_model
        if name is None:
            name = self.settings.draft_model_of(slot.entry.id)
        if not name or slot.entry.embeds:
            return None
        try:
            draft = self.catalog.find(name)
        except ModelNotFound as error:
            raise ModelLoadFailed(f"its draft model: {error.message}") from error
        return None if draft.id == slot.entry.id else draft


def _loaded(slots: Collection[Slot], model_id: str) -> Slot | None:
    """The slot of a model that can be used at once: the disk need not be asked."""
    usable = (slot for slot in slots if slot.available is not None)
    return next((s for s in usable if model_id in (s.entry.id, *s.entry.aliases)), None)


def _model_meant(slots: Collection[Slot], purpose: Purpose, aliases: Collection[str]) -> str:
    """What a request without a name means: the alias `default`, or the one model that can be meant;
    of those that embed if no other is there, or the purpose says so. Raises BadRequest.
    """
    encodes = purpose in ("embed", "rank")
    if DEFAULT in aliases and not encodes:
        return DEFAULT
    ids = [] if encodes else _present(slots, embeds=False)
    if not ids and purpose != "generate":
        ids = _present(slots, embeds=True)
    if len(ids) == 1:
        return ids[0]
    known = f"of {', '.join(sorted(ids))}" if ids else "since none is loaded"
    raise BadRequest(f"Name a `model`, {known}.", param="model")


def _present(slots: Collection[Slot], *, embeds: bool) -> list[str]:
    """Ids of what is in memory, or else of what was named at the start."""
    serving = [slot for slot in slots if slot.entry.embeds is embeds]
    held = [slot for slot in serving if slot.holds_memory and not slot.leaving]
    named = [slot for slot in serving if slot.preloaded]
    return [slot.entry.id for slot in held or named]


def _check_purpose(entry: ModelEntry, purpose: Purpose) -> None:
    if entry.embeds and purpose == "generate":
        raise BadRequest(
            f"The model `{entry.id}` makes embeddings and generates no text; "
            "use it with /v1/embeddings.",
            param="model",
            code="model_cannot_generate",
        )
    if purpose == "embed" and entry.reranks:
        raise BadRequest(
            f"The model `{entry.id}` scores pairs of texts; use it with /v1/rerank.",
            param="model",
            code="model_cannot_embed",
        )
    if purpose in ("embed", "rank") and not entry.embeds:
        raise BadRequest(
            f"The model `{entry.id}` generates text and was not made for embeddings: "
            f"its folder has no {MODULES}, as embedding models have.",
            param="model",
            code="model_cannot_embed",
        )
