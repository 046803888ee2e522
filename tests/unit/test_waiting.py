"""The order in which waiting requests are admitted."""

from mlx_server.engine.plan import Start
from mlx_server.engine.protocol import Generate, Sampling
from mlx_server.engine.schedule.request import WaitingRequest
from mlx_server.engine.schedule.waiting import WaitingQueue


def request(id_: int, caller: str = "", priority: int = 0) -> WaitingRequest:
    asked = Generate(id_, [1, 2], Sampling(), 5, caller=caller, priority=priority)
    return WaitingRequest(Start(asked, []), 100)


def queue_of(*requests: WaitingRequest) -> WaitingQueue:
    queue = WaitingQueue()
    for one in requests:
        queue.add(one)
    return queue


def pop(queue: WaitingQueue) -> WaitingRequest:
    first = next(iter(queue))
    queue.take(first)
    return first


def drained(queue: WaitingQueue) -> list[int]:
    ids = []
    while queue:
        ids.append(pop(queue).id)
    assert len(queue) == 0
    return ids


def test_the_order_is_told_beforehand() -> None:
    queue = queue_of(*(request(i, "ab"[i % 3 == 0], i % 2) for i in range(9)))
    queue.put_back(request(20))
    told = [one.id for one in queue]
    assert told == drained(queue)


def test_one_caller_is_served_in_the_order_of_arrival() -> None:
    assert drained(queue_of(*(request(i) for i in range(5)))) == [0, 1, 2, 3, 4]


def test_callers_take_turns_however_many_requests_each_has() -> None:
    flood = [request(i, "a") for i in range(4)]
    queue = queue_of(*flood, request(10, "b"), request(11, "c"), request(12, "b"))
    assert drained(queue) == [0, 10, 11, 1, 12, 2, 3]


def test_a_caller_that_comes_late_waits_one_round_at_most() -> None:
    queue = queue_of(*(request(i, "a") for i in range(40)))
    assert pop(queue).id == 0
    queue.add(request(100, "b"))
    assert [pop(queue).id, pop(queue).id] == [1, 100]


def test_lower_priority_numbers_come_first_whoever_asks() -> None:
    queue = queue_of(request(1, "a", 5), request(2, "b", 0), request(3, "a", -1))
    assert drained(queue) == [3, 2, 1]


def test_what_was_put_back_comes_out_first_and_in_its_old_order() -> None:
    queue = queue_of(*(request(i) for i in range(4)))
    taken = [pop(queue), pop(queue)]
    for one in reversed(taken):
        queue.put_back(one)
    assert len(queue) == 4
    assert drained(queue) == [0, 1, 2, 3]


def test_removed_requests_leave_the_others_order_alone() -> None:
    queue = queue_of(
        *(request(i, "a") for i in range(3)),
        *(request(i, "b") for i in range(10, 13)),
        request(20, "b", 1),
    )
    back = pop(queue)
    queue.put_back(back)
    gone = queue.remove(frozenset([back.id, 11, 20, 999]))
    assert sorted(one.id for one in gone) == sorted([back.id, 11, 20])
    assert sorted(one.id for one in queue) == [1, 2, 10, 12]
    assert drained(queue) == [10, 1, 12, 2]
    assert not queue
