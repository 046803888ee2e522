"""Decides who loads next and who makes room.

First come, first served. Idle models go first, least recently used. A model in use drains at the
earliest `swap_interval` seconds after its load; its later requests queue, so that alternating
traffic is grouped.
"""

from collections.abc import Collection, Iterable
from enum import Enum, auto

from mlx_server.models.pool.slot import Slot


class Step(Enum):
    LEAVE = auto()
    """Already there, or not wanted."""
    WAIT = auto()
    """Its engine is ending."""
    KEEP = auto()
    """It was draining."""
    LOAD = auto()
    MAKE_ROOM = auto()
    REFUSE = auto()
    """Pinned models leave no room."""


def next_step(first: Slot, slots: Collection[Slot], budget: int) -> Step:
    wanted = first.waiters > 0 or (first.preloaded and not first.proven)
    if not wanted or first.unloaders or first.available is not None:
        return Step.LEAVE
    if first.leaving:
        return Step.WAIT
    if first.model is not None:
        return Step.KEEP
    if pinned_beside(first, slots) + first.need > budget:
        return Step.REFUSE
    if reserved(slots) + first.need > budget:
        return Step.MAKE_ROOM
    return Step.LOAD


def to_drain(
    first: Slot, slots: Collection[Slot], budget: int, swap_interval: float, now: float
) -> list[Slot]:
    others = [slot for slot in slots if slot is not first]
    going = sum(slot.need for slot in others if slot.draining or slot.leaving)
    lacking = reserved(slots) - going + first.need - budget
    chosen: list[Slot] = []
    for slot in sorted(others, key=lambda slot: slot.used_at):
        if lacking > 0 and slot.idle and not slot.draining:
            lacking -= slot.need
            chosen.append(slot)
    for slot in sorted(others, key=lambda slot: slot.loaded_at):
        if lacking > 0 and slot.interruptible:
            if now < slot.loaded_at + swap_interval:
                break
            lacking -= slot.need
            chosen.append(slot)
    return chosen


def expired(slots: Iterable[Slot], now: float) -> list[Slot]:
    return [
        slot
        for slot in slots
        if slot.idle and slot.expires_at is not None and slot.expires_at <= now
    ]


def next_change(
    slots: Collection[Slot], anybody_waits: bool, swap_interval: float, now: float
) -> float | None:
    """When a model expires or, if anybody waits, may be drained."""
    times = [slot.expires_at for slot in slots if slot.idle and slot.expires_at is not None]
    if anybody_waits:
        swaps = [slot.loaded_at + swap_interval for slot in slots if slot.interruptible]
        times += [time for time in swaps if time > now]
    return min(times, default=None)


def reserved(slots: Iterable[Slot]) -> int:
    """Bytes."""
    return sum(slot.need for slot in slots if slot.holds_memory)


def wired(slots: Iterable[Slot]) -> int:
    """Bytes."""
    return sum(slot.wired for slot in slots if slot.holds_memory)


def pinned_beside(first: Slot, slots: Iterable[Slot]) -> int:
    """Bytes never freed for `first`."""
    others = (slot for slot in slots if slot is not first)
    return sum(s.need for s in others if s.pinned and s.holds_memory and not s.leaving)
