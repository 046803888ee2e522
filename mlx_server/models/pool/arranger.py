"""Loads and ends models: owns the queue, and a task per model in memory."""

import asyncio
import logging
import time
from collections.abc import Mapping

from mlx_server.errors import InsufficientMemory
from mlx_server.events import event
from mlx_server.models.pool.eviction import (
    Step,
    expired,
    next_change,
    next_step,
    pinned_beside,
    to_drain,
    wired,
)
from mlx_server.models.pool.loading import LoadedModel, ModelLoader
from mlx_server.models.pool.needs import LoadPlan, MemoryPlanner
from mlx_server.models.pool.slot import Slot

log = logging.getLogger("mlx_server.pool")


class Arranger:
    def __init__(
        self,
        slots: Mapping[str, Slot],
        planner: MemoryPlanner,
        loader: ModelLoader,
        swap_interval: float,
    ) -> None:
        self.line: list[Slot] = []
        self._slots = slots
        self._planner = planner
        self._loader = loader
        self._swap_interval = swap_interval
        self._tasks: dict[Slot, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False

    def enqueue(self, slot: Slot) -> None:
        """`slot` must have a plan."""
        if slot not in self.line and slot.phase != "loading":
            self.line.append(slot)
        self.arrange()

    def arrange(self) -> None:
        """Do what can be done now. Call after every change."""
        if self._stopping:
            return
        for slot in self._slots.values():
            if slot.preloaded and slot.lost and not slot.holds_memory and slot not in self.line:
                self.line.append(slot)
        for slot in expired(self._slots.values(), time.monotonic()):
            self.end(slot)
        while self.line and self._serve(self.line[0]):
            self.line.pop(0)
        if not self.line:
            for slot in self._slots.values():
                if slot.draining and not slot.leaving:
                    slot.keep()
        self._set_timer()

    def end(self, slot: Slot) -> None:
        slot.phase = "ending"
        self._tasks[slot].cancel()

    async def stop(self) -> None:
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks.values())
        for slot, task in self._tasks.items():
            if slot.phase == "loaded":
                self.end(slot)
            elif slot.phase == "loading":
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self._slots.values():
            slot.vacate()  # a task cancelled before its start does not

    def _serve(self, first: Slot) -> bool:
        slots, budget = self._slots.values(), self._planner.budget
        match next_step(first, slots, budget):
            case Step.WAIT:
                return False
            case Step.MAKE_ROOM:
                self._make_room(first)
                return False
            case Step.KEEP:
                first.keep()
            case Step.REFUSE:
                first.fail(
                    InsufficientMemory(
                        f"it needs {first.need:,} bytes of memory, and of the {budget:,} for all "
                        f"models pinned ones hold {pinned_beside(first, slots):,}"
                    )
                )
            case Step.LOAD:
                self._begin_loading(first)
        return True

    def _make_room(self, first: Slot) -> None:
        slots, now = self._slots.values(), time.monotonic()
        for slot in to_drain(first, slots, self._planner.budget, self._swap_interval, now):
            slot.draining = True
        for slot in slots:
            if slot.draining and slot.idle:
                self.end(slot)

    def _begin_loading(self, slot: Slot) -> None:
        assert slot.plan is not None
        slot.plan = self._planner.grant_wired(slot.plan, wired(self._slots.values()))
        slot.begin_loading(time.monotonic())
        self._tasks[slot] = asyncio.create_task(
            self._run(slot, slot.plan), name=f"model {slot.entry.id}"
        )

    async def _run(self, slot: Slot, plan: LoadPlan) -> None:
        try:
            model = await self._loader.load(plan)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, those who wait must hear of it.
            slot.fail(self._loader.failure(error, slot.entry.id))
        else:
            self._take_over(slot, model, plan)
            await self._supervise(slot, model)
        finally:
            slot.vacate()
            del self._tasks[slot]
            self.arrange()

    def _take_over(self, slot: Slot, model: LoadedModel, plan: LoadPlan) -> None:
        facts = model.facts
        slot.finish_loading(model, self._planner.correct(plan, facts), time.monotonic())
        log.info(
            event(
                "model_loaded",
                model=model.id,
                pid=facts.pid,
                device=facts.device,
                seconds=slot.load_seconds,
                weights_bytes=facts.weights_bytes,
                reserved_bytes=slot.need,
                wired_bytes=slot.wired,
                mixed_steps=facts.mixed_steps,
            )
        )
        self.arrange()

    async def _supervise(self, slot: Slot, model: LoadedModel) -> None:
        try:
            await model.supervisor.run(slot.outlives_engine)
        except asyncio.CancelledError:  # by `end`
            await model.supervisor.stop()
            log.info(event("model_unloaded", model=model.id, pid=model.facts.pid))
        except Exception as error:  # noqa: BLE001
            slot.fail(self._loader.failure(error, model.id))
            model.engine.fail(slot.failure())
        else:
            slot.lost = True
            slot.proven = False

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        when = next_change(self._slots.values(), bool(self.line), self._swap_interval, now)
        if when is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, when - now), self.arrange)
