"""Which texts of which requests an embedding engine computes together, and in what order."""

from mlx_server.engine.embedding.jobs import MOST_PADDING, JobQueue, Pass
from mlx_server.engine.protocol import Embed


def request(id_: int, lengths: list[int], caller: str = "", priority: int = 0) -> Embed:
    return Embed(id_, [[5] * length for length in lengths], caller=caller, priority=priority)


def chosen(texts: Pass) -> list[tuple[int, int]]:
    return [(job.request.id, index) for job, index in texts.chosen]


def drained(queue: JobQueue, budget: int) -> list[set[int]]:
    """The ids in each pass until the queue is empty."""
    passes = []
    while len(queue):
        texts = queue.next_pass(budget)
        passes.append(set(texts.jobs))
        queue.finish(texts)
    return passes


def test_a_pass_takes_the_longest_texts_first_within_its_budget() -> None:
    queue = JobQueue()
    queue.add(request(1, [9, 0, 10, 3, 10]))
    texts = queue.next_pass(budget=30)
    assert chosen(texts) == [(1, 2), (1, 4), (1, 0)]
    assert texts.size == 30
    queue.finish(texts)
    assert chosen(queue.next_pass(budget=30)) == [(1, 3)]


def test_a_text_that_exceeds_the_budget_goes_alone() -> None:
    queue = JobQueue()
    queue.add(request(1, [50, 50]))
    assert chosen(queue.next_pass(budget=10)) == [(1, 0)]


def test_texts_that_would_be_mostly_padding_wait() -> None:
    queue = JobQueue()
    queue.add(request(1, [100]))
    queue.add(request(2, [10, 90]))
    texts = queue.next_pass(budget=1000)
    assert chosen(texts) == [(1, 0), (2, 1)]
    assert texts.size <= MOST_PADDING * 190


def test_callers_take_turns_whatever_they_ask_for() -> None:
    queue = JobQueue()
    for id_ in (1, 2, 3):
        queue.add(request(id_, [10, 10], caller="many"))
    queue.add(request(9, [10, 10], caller="one"))
    assert drained(queue, budget=10) == [{1}, {9}, {2}, {9}, {3}, {1}, {2}, {3}]


def test_lower_priorities_come_first() -> None:
    queue = JobQueue()
    queue.add(request(1, [10], priority=1))
    queue.add(request(2, [10, 10], priority=0))
    assert drained(queue, budget=10) == [{2}, {2}, {1}]


def test_a_removed_request_is_in_no_pass() -> None:
    queue = JobQueue()
    queue.add(request(1, [10]))
    queue.remove([1, 7])
    assert len(queue) == 0
    assert chosen(queue.next_pass(100)) == []
