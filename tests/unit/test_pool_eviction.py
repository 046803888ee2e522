"""Who is loaded next and who makes room, decided over slots alone."""

from pathlib import Path
from typing import Any

import pytest

from mlx_server.engine.protocol import LoadOptions
from mlx_server.models.pool.eviction import (
    Step,
    expired,
    next_change,
    next_step,
    reserved,
    to_drain,
)
from mlx_server.models.pool.footprint import Footprint
from mlx_server.models.pool.needs import LoadPlan, Need
from mlx_server.models.pool.slot import Slot
from mlx_server.models.store.catalog import ModelEntry

BUDGET = 100
LOADED: Any = object()


def slot(name: str, need: int = 60, **state: Any) -> Slot:
    entry = ModelEntry(name, Path(name), "folder")
    footprint = Footprint(False, need, 0, 1, 0, 0)
    plan = LoadPlan(entry, Path(name), footprint, Need(need, 0, 0), LoadOptions(), None)
    return Slot(entry, plan=plan, **state)


def loaded(name: str, need: int = 60, **state: Any) -> Slot:
    return slot(name, need, phase="loaded", model=LOADED, proven=True, **state)


def wanted(name: str = "wanted", need: int = 60, **state: Any) -> Slot:
    return slot(name, need, waiters=1, **state)


def step(first: Slot, *others: Slot) -> Step:
    return next_step(first, [first, *others], BUDGET)


def drained(
    first: Slot, *others: Slot, now: float = 100.0, swap_interval: float = 10.0
) -> list[str]:
    chosen = to_drain(first, [first, *others], BUDGET, swap_interval, now)
    return [one.entry.id for one in chosen]


# the first in line


def test_what_fits_is_loaded() -> None:
    assert step(wanted(need=40), loaded("a", 60)) is Step.LOAD
    assert step(wanted(need=41), loaded("a", 60)) is Step.MAKE_ROOM


@pytest.mark.parametrize("phase", ["loading", "ending"])
def test_models_that_come_and_go_hold_their_memory(phase: Any) -> None:
    other = slot("a", phase=phase)
    assert reserved([other]) == 60
    assert step(wanted(), other) is Step.MAKE_ROOM
    assert reserved([slot("b")]) == 0


def test_nothing_is_loaded_for_nobody() -> None:
    assert step(slot("a")) is Step.LEAVE
    assert step(slot("a", preloaded=True)) is Step.LOAD
    assert step(slot("a", preloaded=True, proven=True)) is Step.LEAVE


def test_a_model_that_is_there_leaves_the_line() -> None:
    assert step(loaded("a", waiters=1)) is Step.LEAVE


def test_a_model_that_was_to_make_room_stays_when_its_turn_comes() -> None:
    assert step(loaded("a", waiters=1, draining=True)) is Step.KEEP


def test_a_model_on_its_way_out_is_waited_for() -> None:
    assert step(slot("a", waiters=1, phase="ending", model=LOADED)) is Step.WAIT


def test_a_model_that_an_operator_unloads_is_not_waited_for() -> None:
    assert step(loaded("a", waiters=1, unloaders=1)) is Step.LEAVE


def test_what_pinned_models_leave_no_room_for_is_refused() -> None:
    assert step(wanted(), loaded("a", pinned=True)) is Step.REFUSE
    assert step(wanted(need=40), loaded("a", pinned=True)) is Step.LOAD
    assert step(wanted(), slot("a", pinned=True)) is Step.LOAD
    assert step(wanted(), loaded("a", pinned=True, unloaders=1)) is Step.MAKE_ROOM


# who makes room


def test_the_least_recently_used_idle_model_goes_first() -> None:
    idle = [loaded(name, 30, used_at=at) for name, at in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    assert drained(wanted(need=30), *idle) == ["b"]
    assert drained(wanted(need=60), *idle) == ["b", "c"]


def test_idle_models_go_before_those_in_use() -> None:
    busy, idle = loaded("busy", 50, in_use=1), loaded("idle", 50, used_at=90.0)
    assert drained(wanted(need=50), busy, idle) == ["idle"]
    assert drained(wanted(need=100), busy, idle) == ["idle", "busy"]


def test_models_in_use_go_in_the_order_in_which_they_were_loaded() -> None:
    busy = [loaded(name, 50, in_use=1, loaded_at=at) for name, at in (("a", 2.0), ("b", 1.0))]
    assert drained(wanted(need=50), *busy) == ["b"]


def test_a_model_in_use_is_left_alone_for_the_swap_interval() -> None:
    busy = loaded("a", in_use=1, loaded_at=95.0)
    assert drained(wanted(), busy, now=104.9) == []
    assert drained(wanted(), busy, now=105.0) == ["a"]


def test_no_more_models_go_than_are_needed() -> None:
    going = loaded("going", 50, draining=True, in_use=1)
    assert drained(wanted(need=50), going, loaded("b", 50)) == []
    leaving = loaded("leaving", 50, in_use=1, unloaders=1)
    assert drained(wanted(need=50), leaving, loaded("b", 50)) == []


@pytest.mark.parametrize(
    "state", [{"pinned": True}, {"waiters": 1}, {"draining": True, "in_use": 1}]
)
def test_models_that_are_pinned_or_about_to_be_used_stay(state: dict[str, Any]) -> None:
    assert drained(wanted(), loaded("a", **state)) == []


# time


def test_models_expire_when_they_have_been_idle_for_long_enough() -> None:
    one = loaded("a", expires_at=100.0)
    assert expired([one], 99.9) == []
    assert expired([one], 100.0) == [one]
    for state in ({"pinned": True}, {"in_use": 1}, {"waiters": 1}):
        assert expired([loaded("b", expires_at=100.0, **state)], 101.0) == []


def test_the_pool_looks_again_when_something_expires_or_may_be_interrupted() -> None:
    idle = loaded("idle", expires_at=50.0)
    busy = loaded("busy", in_use=1, loaded_at=30.0)
    slots = [idle, busy]
    assert next_change(slots, False, 10.0, 20.0) == 50.0
    assert next_change(slots, True, 10.0, 20.0) == 40.0
    assert next_change(slots, True, 10.0, 40.0) == 50.0
    assert next_change([busy], False, 10.0, 20.0) is None
