"""Who is loaded next and who makes room for it: decisions over slots, which they leave as they are.

The model asked for first is made room for first. Idle models go first, the least recently used
before others. A model in use is left alone for `swap_interval` seconds after it was loaded; then it
takes no new request, finishes what it has, and goes. Its later requests join the line, so that
traffic alternating between models is served in groups.
"""

from collections.abc import Collection, Iterable
from enum import Enum, auto

from mlx_server.models.pool.slot import Slot


class Step(Enum):
    """What to do for the first in line."""

    LEAVE = auto()
    """Nobody waits for it any more, or it is there."""
    WAIT = auto()
    """It is on its way out, and can be loaded again after that."""
    KEEP = auto()
    """It was to make room, and stays."""
    LOAD = auto()
    MAKE_ROOM = auto()
    REFUSE = auto()
    """Pinned models leave no room for it."""


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
    """Models that are to take no new request, so that there is room for `first` in the end."""
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
    """Models that nobody has used for as long as they stay."""
    return [
        slot
        for slot in slots
        if slot.idle and slot.expires_at is not None and slot.expires_at <= now
    ]


def next_change(
    slots: Collection[Slot], anybody_waits: bool, swap_interval: float, now: float
) -> float | None:
    """When the next model expires or, if one is waited for, may be interrupted."""
    times = [slot.expires_at for slot in slots if slot.idle and slot.expires_at is not None]
    if anybody_waits:
        swaps = [slot.loaded_at + swap_interval for slot in slots if slot.interruptible]
        times += [time for time in swaps if time > now]
    return min(times, default=None)


def reserved(slots: Iterable[Slot]) -> int:
    """Bytes promised to models that are loaded, loading or on their way out."""
    return sum(slot.need for slot in slots if slot.holds_memory)


def pinned_beside(first: Slot, slots: Iterable[Slot]) -> int:
    """Bytes that can never be made free for `first`."""
    others = (slot for slot in slots if slot is not first)
    return sum(s.need for s in others if s.pinned and s.holds_memory and not s.leaving)
