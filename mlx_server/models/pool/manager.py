"""The models that are loaded: one engine process each, within one memory budget.

`acquire` is the one way to a model. Everything about loading, waiting, limits, eviction and
replacement is behind it; `pool.slot` holds the life of a single model.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from mlx_server.config import Settings
from mlx_server.engine.protocol import Device
from mlx_server.errors import (
    BadRequest,
    InsufficientMemory,
    ModelLoading,
    ServerError,
    Unavailable,
)
from mlx_server.events import event
from mlx_server.models.pool.device import find_device
from mlx_server.models.pool.slot import LoadedModel, ModelStatus, Slot
from mlx_server.models.store.catalog import Catalog, ModelEntry
from mlx_server.models.store.embedding_files import MODULES
from mlx_server.models.text.client import TextProcess
from mlx_server.units import parse_bytes

SHORTEST_RETRY = 1.0
"""Seconds a client is told to wait at least before it asks again."""

Purpose = Literal["generate", "embed", "any"]

log = logging.getLogger("mlx_server.pool")


class ModelPoolManager:
    """Loads models on demand, shares them, and evicts those that are idle when room is needed.

    Who waits for a model that does not fit stands in a line: the model asked for first is made
    room for first. Idle models go first, the least recently used before others. A model in use is
    left alone for `settings.swap_interval` seconds after it was loaded; then it takes no new
    request, finishes what it has, and makes room. Its later requests join the line, so that
    traffic alternating between models is served in groups.
    """

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self.settings = settings
        self.catalog = catalog
        self.device: Device | None = None
        self.budget = 0
        self._texts = TextProcess(settings.prompt_timeout)
        self._slots: dict[str, Slot] = {}
        self._line: list[Slot] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False

    async def start(self, models: list[str]) -> None:
        """Learn the budget and begin to load `models` in the background.

        Raises ServerError when MLX cannot be used here at all.
        """
        self.device = await find_device()
        self.budget = parse_bytes(self.settings.memory_limit, self.device.memory)
        log.info(event("budget", device=self.device.name, bytes=self.budget))
        for name in self.settings.pinned:
            (await self._slot(name)).pinned = True
        for model_id in models:
            slot = await self._slot(model_id)
            slot.resident = True
            with contextlib.suppress(ServerError):  # the slot keeps it for `not_ready_reason`
                await slot.measure(self.device, self.budget)
                self._line.append(slot)
        self._arrange()

    async def stop(self) -> None:
        """End every engine. Loads under way are given up."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(slot.stop() for slot in self._slots.values()))
        await self._texts.kill()

    @property
    def ready(self) -> bool:
        """Whether all models named at the start have been loaded and none of them is failing."""
        return not self._stopping and all(slot.proven for slot in self._residents)

    @property
    def not_ready_reason(self) -> str | None:
        """Which models cannot generate yet, and why; None when all can."""
        if self._stopping:
            return "The server is stopping."
        missing = [slot for slot in self._residents if not slot.proven]
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

    @property
    def _residents(self) -> list[Slot]:
        """The models named at the start."""
        return [slot for slot in self._slots.values() if slot.resident]

    @property
    def reserved(self) -> int:
        """Bytes promised to the models that are loaded, loading or on their way out."""
        return sum(slot.need for slot in self._slots.values() if slot.holds_memory)

    @asynccontextmanager
    async def acquire(
        self, model_id: str, keep_alive: float | None = None, purpose: Purpose = "generate"
    ) -> AsyncIterator[LoadedModel]:
        """The model of that id or alias, loaded and kept loaded as long as the block lasts.

        `keep_alive` is how many seconds it stays loaded afterwards, negative for as long as there
        is room, None as the settings say. Raises ModelNotFound, BadRequest for a model that does
        not serve `purpose`, ModelLoading when it does not load within `settings.load_wait` seconds,
        ModelLoadFailed, and InsufficientMemory when it can never fit.
        """
        slot = await self._slot(model_id)
        _check_purpose(slot.entry, purpose)
        model = slot.offer() or await self._wait_for(slot)
        slot.take()
        if self._line:
            self._arrange()
        try:
            yield model
        finally:
            slot.let_go(keep_alive)
            self._arrange()

    async def load(self, model_id: str) -> ModelStatus:
        """Load a model now, however long that takes. Raises as `acquire` does."""
        slot = await self._slot(model_id)
        if slot.offer() is None:
            await self._wait_for(slot, self.settings.load_timeout)
        return slot.status()

    async def unload(self, model_id: str) -> ModelStatus:
        """Let a model finish what it has, then end its engine; returns when that has happened."""
        slot = await self._slot(model_id)
        if slot.loading:
            raise BadRequest(f"The model `{slot.entry.id}` is still loading.", param="model")
        try:
            await slot.unload()
        finally:
            self._arrange()
        return slot.status()

    async def _slot(self, model_id: str) -> Slot:
        if self._stopping:
            raise Unavailable("The server is stopping.", retry_after=SHORTEST_RETRY)
        entry = await asyncio.to_thread(self.catalog.find, model_id)
        slot = self._slots.get(entry.id)
        if slot is None:
            slot = self._slots[entry.id] = Slot(entry, self.settings, self._texts, self._arrange)
        slot.entry = entry  # its folder may have been replaced
        return slot

    async def _wait_for(self, slot: Slot, seconds: float | None = None) -> LoadedModel:
        """Stand in line for `slot` until it is loaded."""
        seconds = self.settings.load_wait if seconds is None else seconds
        if slot.waiters >= self.settings.max_load_waiters:
            raise ModelLoading(
                f"{slot.waiters} requests wait for the model `{slot.entry.id}` already.",
                retry_after=slot.remaining_load_seconds(),
            )
        failures = slot.failures
        slot.waiters += 1
        try:
            async with asyncio.timeout(seconds):
                return await self._loaded(slot, failures)
        except TimeoutError as error:
            raise ModelLoading(
                f"The model `{slot.entry.id}` is not loaded after {seconds:g} seconds "
                f"({slot.state}). Ask again.",
                retry_after=slot.remaining_load_seconds(),
            ) from error
        finally:
            slot.waiters -= 1
            # It may hold up the line, or stay loaded, and not be wanted any more.
            asyncio.get_running_loop().call_soon(self._arrange)

    async def _loaded(self, slot: Slot, failures: int) -> LoadedModel:
        while (model := slot.offer()) is None:
            if slot.failures > failures:
                raise slot.failure()
            if self._stopping:
                raise Unavailable("The server is stopping.", retry_after=SHORTEST_RETRY)
            if slot in self._line or slot.loading or slot.measuring or slot.leaving:
                await slot.changed()
            else:
                assert self.device is not None
                await slot.measure(self.device, self.budget)
                self._join_line(slot)
        return model

    def _join_line(self, slot: Slot) -> None:
        """Stand `slot` in line, unless that has happened while its files were read."""
        if slot not in self._line and not slot.loading:
            self._line.append(slot)
        self._arrange()

    def _arrange(self) -> None:
        """Load what stands first in line, after making room for it. Safe to call at any time."""
        if self._stopping:
            return
        self._recall_lost()
        self._end_expired()
        while self._line and self._serve_first(self._line[0]):
            pass
        if not self._line:
            self._resume_all()
        self._set_timer()

    def _serve_first(self, slot: Slot) -> bool:
        """Do what can be done now for the first in line; says whether it has left the line."""
        wanted = slot.waiters > 0 or (slot.resident and not slot.proven)
        if wanted and not slot.unloaders and slot.offer() is None:
            if slot.leaving:
                return False  # it comes back after that, which is soon
            if slot.model is not None:
                slot.resume()
            elif self._pinned_beside(slot) + slot.need > self.budget:
                slot.fail(self._blocked(slot))
            elif self.reserved + slot.need > self.budget:
                self._make_room(slot)
                return False
            else:
                slot.begin_loading()
        self._line.pop(0)
        return True

    def _make_room(self, slot: Slot) -> None:
        """Let go of as many models as `slot` needs: the idle first, then those in use."""
        others = [other for other in self._slots.values() if other is not slot]
        going = sum(other.need for other in others if other.draining or other.leaving)
        lacking = self.reserved - going + slot.need - self.budget
        for other in sorted(others, key=lambda other: other.used_at):
            if lacking > 0 and other.idle and not other.draining:
                lacking -= other.need
                other.drain()
        for other in sorted(others, key=lambda other: other.loaded_at):
            if lacking > 0 and other.interruptible:
                if time.monotonic() < other.loaded_at + self.settings.swap_interval:
                    break
                lacking -= other.need
                other.drain()
        for other in others:
            if other.draining and other.idle:
                other.begin_ending()

    def _resume_all(self) -> None:
        """Nobody waits for room any more: what was to make some stays."""
        for slot in self._slots.values():
            if slot.draining and not slot.leaving:
                slot.resume()

    def _pinned_beside(self, slot: Slot) -> int:
        """Bytes that can never be made free for `slot`."""
        others = [other for other in self._slots.values() if other is not slot]
        return sum(o.need for o in others if o.pinned and o.holds_memory and not o.leaving)

    def _blocked(self, slot: Slot) -> InsufficientMemory:
        return InsufficientMemory(
            f"it needs {slot.need:,} bytes of memory, and of the {self.budget:,} for all models "
            f"pinned ones hold {self._pinned_beside(slot):,}"
        )

    def _recall_lost(self) -> None:
        """Load again what was named at the start and whose engine ended by itself."""
        for slot in self._residents:
            if slot.lost and slot not in self._line and not slot.holds_memory:
                self._line.append(slot)

    def _end_expired(self) -> None:
        now = time.monotonic()
        for slot in self._slots.values():
            if slot.idle and slot.expires_at is not None and slot.expires_at <= now:
                slot.begin_ending()

    def _set_timer(self) -> None:
        """Come back when the next idle model expires or the next one in use may be interrupted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        times = [s.expires_at for s in self._slots.values() if s.idle and s.expires_at is not None]
        if self._line:
            interval = self.settings.swap_interval
            ends = [s.loaded_at + interval for s in self._slots.values() if s.interruptible]
            times += [end for end in ends if end > now]
        if times:
            # The soonest may have come since those that have expired were ended.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, min(times) - now), self._arrange)


def _check_purpose(entry: ModelEntry, purpose: Purpose) -> None:
    """Raise BadRequest for a model that cannot do what is asked for."""
    if entry.embeds and purpose == "generate":
        raise BadRequest(
            f"The model `{entry.id}` makes embeddings and generates no text; "
            "use it with /v1/embeddings.",
            param="model",
            code="model_cannot_generate",
        )
    if purpose == "embed" and not entry.embeds:
        raise BadRequest(
            f"The model `{entry.id}` generates text and was not made for embeddings: "
            f"its folder has no {MODULES}, as embedding models have.",
            param="model",
            code="model_cannot_embed",
        )
