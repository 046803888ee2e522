"""A model's state and use counts, written by the pool only."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Literal

from mlx_server.errors import InsufficientMemory, LoadCrashed, ModelLoadFailed, ServerError
from mlx_server.events import event
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.needs import LoadPlan
from mlx_server.models.store.catalog import ModelEntry

MIN_RETRY_AFTER = 1.0
"""Seconds."""

Phase = Literal["absent", "loading", "loaded", "ending"]

log = logging.getLogger("mlx_server.pool")


class Signal:
    """Wakes all current waiters."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()


@dataclass(eq=False, slots=True)
class Slot:
    """A model's place in the pool. `now` and `..._at` are monotonic seconds."""

    entry: ModelEntry
    keep_alive: float | None = None
    """Seconds it stays unused; None for ever."""
    pinned: bool = False
    draft_model: str | None = None
    """As somebody chose it, empty for none; None per settings."""
    preloaded: bool = False
    """Named at the start: stays while there is room."""
    phase: Phase = "absent"
    plan: LoadPlan | None = None
    model: LoadedModel | None = None
    error: ServerError | None = None
    measuring: bool = False
    draining: bool = False
    """Takes no new request, to make room."""
    lost: bool = False
    """Its engine ended while unused."""
    proven: bool = False
    """Loaded, and not lost since."""
    in_use: int = 0
    waiters: int = 0
    unloaders: int = 0
    loads: int = 0
    failures: int = 0
    restarts: int = 0
    last_lines: tuple[str, ...] = ()
    last_used: float | None = None
    """Since the epoch."""
    load_seconds: float | None = None
    began_at: float = 0.0
    loaded_at: float = 0.0
    used_at: float = 0.0
    expires_at: float | None = None
    changed: Signal = field(default_factory=Signal)

    @property
    def holds_memory(self) -> bool:
        return self.phase != "absent"

    @property
    def need(self) -> int:
        """Bytes; 0 while unknown."""
        return self.plan.bytes if self.plan else 0

    @property
    def wired(self) -> int:
        """Bytes that it may wire, or has wired."""
        return self.plan.wired * self.plan.processes if self.plan else 0

    @property
    def leaving(self) -> bool:
        return self.phase == "ending" or (self.phase == "loaded" and self.unloaders > 0)

    @property
    def available(self) -> LoadedModel | None:
        return None if self.draining or self.leaving else self.model

    @property
    def idle(self) -> bool:
        """Loaded, unused and free to be ended."""
        if self.phase != "loaded" or self.in_use or self.pinned:
            return False
        # A model's waiters are about to get it.
        return self.draining or not self.waiters

    @property
    def interruptible(self) -> bool:
        """In use and free to be drained."""
        return self.phase == "loaded" and self.in_use > 0 and not (self.draining or self.pinned)

    def pin(self, pinned: bool, now: float) -> None:
        self.pinned = pinned
        if self.phase == "loaded" and not self.in_use:
            self._begin_idling(None, now)

    def acquire(self) -> None:
        self.in_use += 1
        self.expires_at = None

    def release(self, keep_alive: float | None, now: float) -> None:
        """Stays for `keep_alive` seconds: None per settings, negative while there is room."""
        self.in_use -= 1
        self.last_used = time.time()
        if self.in_use == 0 and self.model is not None:
            self._begin_idling(keep_alive, now)
        self.changed.notify()

    def outlives_engine(self) -> bool:
        """Whether the engine, which has ended, is to be replaced. If not, nobody gets the model
        from now on: who did would wait for an engine that does not come.
        """
        if self.in_use:
            return True
        self.phase = "ending"
        return False

    def keep(self) -> None:
        self.draining = False
        self.changed.notify()

    def begin_loading(self, now: float) -> None:
        self.phase = "loading"
        self.began_at = now
        self.error = None
        self.lost = False
        self.loads += 1

    def finish_loading(self, model: LoadedModel, plan: LoadPlan, now: float) -> None:
        self.phase = "loaded"
        self.model = model
        self.plan = plan
        self.draining = False
        self.proven = True
        self.loaded_at = now
        self.load_seconds = now - self.began_at
        self._begin_idling(None, now)
        self.changed.notify()

    def fail(self, error: ServerError) -> None:
        self.error = error
        if isinstance(error, LoadCrashed):
            self.last_lines = error.last_lines
        self.failures += 1
        self.proven = False
        log.error(event("model_load_failed", model=self.entry.id, reason=error.message))
        self.changed.notify()

    def failure(self) -> ServerError:
        error = self.error or ModelLoadFailed("unknown reason")
        kind = InsufficientMemory if isinstance(error, InsufficientMemory) else ModelLoadFailed
        return kind(
            f"The model `{self.entry.id}` could not be loaded: {error.message}",
            param="model",
            retry_after=MIN_RETRY_AFTER,
        )

    def vacate(self) -> None:
        """Its engine has ended or never started; its memory is free."""
        if self.model is not None:
            supervisor = self.model.supervisor
            self.restarts += supervisor.restarts
            self.last_lines = supervisor.last_lines or self.last_lines
            self.model.close()
        self.phase = "absent"
        self.model = None
        self.draining = False
        self.expires_at = None
        self.changed.notify()

    def _begin_idling(self, keep_alive: float | None, now: float) -> None:
        self.used_at = now
        if keep_alive is None and not self.preloaded:
            keep_alive = self.keep_alive
        stays = self.pinned or keep_alive is None or keep_alive < 0
        self.expires_at = None if stays or keep_alive is None else now + keep_alive
