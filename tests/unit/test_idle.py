"""Chores of an idle engine."""

import pytest

from mlx_server.engine.idle import Chore, IdleTime


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_chores_run_once_in_each_stretch_of_idle_time_and_never_beside_work() -> None:
    clock, done = Time(), list[str]()
    soon, later = Chore(3, lambda: done.append("soon")), Chore(60, lambda: done.append("later"))
    idle = IdleTime([later, soon], clock)
    for _ in range(5):  # requests that come every two seconds
        clock.now += 2
        idle.begin()
        idle.spend()
    assert (done, idle.left()) == ([], 3)
    clock.now += 3
    idle.spend()
    idle.spend()
    assert (done, idle.left()) == (["soon"], 57)
    clock.now += 57
    idle.spend()
    assert (done, idle.left()) == (["soon", "later"], None)
    idle.begin()
    assert idle.left() == 3


def test_a_chore_in_portions_goes_on_until_it_is_done() -> None:
    clock, portions = Time(), iter([0.5, 0.5, None])
    idle = IdleTime([Chore(1, lambda: next(portions))], clock)
    clock.now += 1
    idle.spend()
    assert idle.left() == 0.5
    clock.now += 0.5
    idle.spend()
    clock.now += 0.5
    idle.spend()
    assert idle.left() is None
    with pytest.raises(StopIteration):
        next(portions)
