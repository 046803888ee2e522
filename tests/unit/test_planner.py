"""What a turn computes, decided without a model: requests and numbers go in, Plans come out."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_server.engine.cache.prefix import BLOCK, extend_keys
from mlx_server.engine.plan import Chunk, ChunkTime, DraftTime, Outcome, Plan, Start
from mlx_server.engine.protocol import Batching, Generate, Sampling, Sharing
from mlx_server.engine.run.drafted import Drafted
from mlx_server.engine.run.groups import padded
from mlx_server.engine.run.lookup import Experience, Lookup
from mlx_server.engine.schedule.admission import Admission
from mlx_server.engine.schedule.backoff import KvBackoff
from mlx_server.engine.schedule.pace import LARGEST_CHUNK, SMALLEST_CHUNK, Pace
from mlx_server.engine.schedule.planner import Planner
from mlx_server.engine.schedule.request import WaitingRequest
from mlx_server.engine.schedule.room import KvRoom
from mlx_server.engine.schedule.waiting import WaitingQueue
from mlx_server.engine.sequence import Sequence

CONTEXT = 4096
PREFIX_LIMIT = 1 << 20
CHUNK = 256
ALIKE = list(range(10 * BLOCK))
FULL = Batching(Sharing.ANY, Sharing.ANY)


class Cost:
    """One byte a token and row."""

    def bytes(self, rows: int, tokens: int) -> int:
        return rows * tokens


@dataclass
class Read:
    done: bool = False


@dataclass
class Grammars:
    """Compiles nothing by itself: a test says when a grammar is ready."""

    futures: dict[str, Future[Any]] = field(default_factory=dict)

    def compile(self, text: str) -> Future[Any]:
        return self.futures.setdefault(text, Future())


class Prefixes:
    """Names of blocks in memory and on the disk."""

    def __init__(self) -> None:
        self.memory: set[bytes] = set()
        self.disk: set[bytes] = set()
        self.layout = SimpleNamespace(sliceable=True)
        self.capacity = 1000

    def known(self, keys: list[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.memory), len(keys))

    def on_disk(self, keys: list[bytes]) -> list[bytes]:
        return [key for key in keys[self.known(keys) :] if key in self.disk]


class Side:
    """The running side as the deciding side sees it, driven by hand."""

    def __init__(self, mixes: bool, batching: Batching) -> None:
        self.model = SimpleNamespace(mixes=mixes, batching=batching, goes_back=False)
        self.prefix = Prefixes()
        self.grammars = Grammars()
        self.context_length = CONTEXT
        self.drafts: Any = None
        self.prefills: dict[int, Any] = {}
        self.waiting = SimpleNamespace(reads={})
        self.rows: list[Sequence] = []

    @property
    def batch(self) -> Any:
        return SimpleNamespace(rows=self.rows, busy=bool(self.rows))

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.rows, *(s for p in self.prefills.values() for s in p.sequences)]

    def begin(self, plan: Plan) -> None:
        """What was to begin is being computed."""
        assert plan.begin is not None
        sequences = [Sequence(start, CONTEXT) for start in plan.begin.starts]
        self.prefills[sequences[0].id] = SimpleNamespace(
            sequences=sequences,
            position=0,
            length=len(sequences[0].prompt) - 1,
            mixes=len(sequences) == 1,
            until=plan.begin.until,
        )

    def join(self, id_: int) -> None:
        """A prefill has ended, and its sequences have given a token each."""
        for sequence in self.prefills.pop(id_).sequences:
            sequence.reported = True
            sequence.launched += 1
            self.rows.append(sequence)


class Deciding:
    """The deciding side with its parts, over a `Side`."""

    def __init__(
        self,
        limit: int = 1 << 20,
        chunk: int | None = CHUNK,
        mixes: bool = True,
        batching: Batching = FULL,
    ) -> None:
        self.side = Side(mixes, batching)
        self.waiting = WaitingQueue()
        self.suspects: set[int] = set()
        self.backoff = KvBackoff(1.0)
        cost: Any = Cost()
        runner: Any = self.side
        lengths = padded(batching.decode, mixes=mixes)
        self.room = KvRoom(cost, limit, PREFIX_LIMIT, self.backoff, lengths)
        self.admission = Admission(self.waiting, runner, self.room, self.suspects, max_batch=4)
        self.pace = Pace(chunk)
        self.planner = Planner(runner, self.admission, self.room, self.pace)

    def ask(self, id_: int, prompt: list[int], max_tokens: int = 20, **more: Any) -> None:
        keys: list[bytes] = []
        extend_keys(keys, prompt)
        request = Generate(id_, prompt, Sampling(), max_tokens, caller=str(id_), **more)
        self.waiting.add(WaitingRequest(Start(request, keys), CONTEXT))

    def decide(self, *drop: int) -> Plan:
        self.admission.compile_grammars()
        return self.planner.decide(list(drop))

    def running(self, id_: int, prompt: list[int], max_tokens: int = 20) -> None:
        """A request that decodes."""
        self.ask(id_, prompt, max_tokens)
        while (plan := self.decide()).begin is None:
            continue
        self.side.begin(plan)
        self.side.join(id_)


def begun(plan: Plan) -> list[int]:
    return [start.request.id for start in plan.begin.starts] if plan.begin else []


def prompt_of(length: int, first: int = 7) -> list[int]:
    return [first, *range(length - 1)]


def test_short_prompts_begin_together_and_a_long_one_by_itself() -> None:
    deciding = Deciding()
    for id_, length in enumerate([40, 50, 45, 900]):
        deciding.ask(id_, prompt_of(length, first=id_ + 1000))
    plan = deciding.decide()
    assert begun(plan) == [0, 1, 2]
    assert plan.chunk is not None
    assert plan.chunk.id == 0
    deciding.side.begin(plan)
    deciding.side.join(0)
    assert begun(deciding.decide()) == [3]


def test_no_more_begin_than_there_are_places() -> None:
    deciding = Deciding()
    for id_ in range(6):
        deciding.ask(id_, prompt_of(20, first=id_ + 1000))
    plan = deciding.decide()
    assert begun(plan) == [0, 1, 2, 3]
    deciding.side.begin(plan)
    assert not any(begun(deciding.decide()) for _ in range(4))


@pytest.mark.parametrize(
    ("decode", "prefill", "together"),
    [
        (Sharing.ANY, Sharing.EQUAL, [0, 1, 2]),
        (Sharing.EQUAL, Sharing.EQUAL, [0, 1]),
        (Sharing.ANY, Sharing.NONE, [0]),
        (Sharing.NONE, Sharing.NONE, [0]),
    ],
)
def test_prompts_begin_together_only_where_the_model_computes_such_rightly(
    decode: Sharing, prefill: Sharing, together: list[int]
) -> None:
    deciding = Deciding(mixes=False, batching=Batching(decode, prefill))
    for id_, length in enumerate([40, 40, 50]):
        deciding.ask(id_, prompt_of(length, first=id_ + 1000))
    assert begun(deciding.decide()) == together


def test_room_is_kept_for_padding_only_where_rows_are_padded() -> None:
    lengths = [10, 600, 2000]
    assert padded(Sharing.ANY, mixes=False)(lengths) == [2000, 2000, 2000]
    assert padded(Sharing.ANY, mixes=True)(lengths) == [266, 1200, 2000]
    for sharing in (Sharing.EQUAL, Sharing.NONE):
        assert padded(sharing, mixes=False)(lengths) == lengths


def test_what_prompts_share_is_computed_once() -> None:
    deciding = Deciding()
    for id_ in range(3):
        deciding.ask(id_, [*ALIKE, *prompt_of(40, first=id_ + 1000)])
    plan = deciding.decide()
    assert begun(plan) == [0]
    assert plan.begin is not None
    assert plan.begin.until == len(ALIKE)
    deciding.side.begin(plan)
    assert not any(begun(deciding.decide()) for _ in range(3)), "the others wait for it"


def test_a_prefix_on_the_disk_is_fetched_then_loaded_then_used() -> None:
    deciding = Deciding()
    deciding.ask(1, [*ALIKE, 5])
    keys = next(iter(deciding.waiting)).keys
    deciding.side.prefix.disk.update(keys)
    plan = deciding.decide()
    assert [(fetch.id, fetch.wanted) for fetch in plan.fetch] == [(1, keys)]
    assert begun(plan) == []
    deciding.side.waiting.reads[1] = Read()
    assert deciding.decide().load == []
    deciding.side.waiting.reads[1].done = True
    assert deciding.decide().load == [1]
    del deciding.side.waiting.reads[1]
    deciding.side.prefix.memory.update(keys)
    plan = deciding.decide()
    assert begun(plan) == [1]
    assert plan.fetch == []


def test_a_disk_that_cannot_deliver_is_not_asked_again() -> None:
    deciding = Deciding()
    deciding.ask(1, [*ALIKE, 5])
    deciding.side.prefix.disk.update(next(iter(deciding.waiting)).keys)
    assert deciding.decide().fetch
    plan = deciding.decide()  # the read is gone and nothing came of it
    assert plan.fetch == []
    assert begun(plan) == [1]


def test_a_grammar_being_compiled_holds_nobody_else_up() -> None:
    deciding = Deciding()
    deciding.ask(1, prompt_of(20), grammar="slow")
    deciding.ask(2, prompt_of(20, first=9))
    plan = deciding.decide()
    assert begun(plan) == [2]
    deciding.side.begin(plan)
    deciding.side.join(2)
    deciding.side.grammars.futures["slow"].set_result(SimpleNamespace(ends=lambda stops: stops))
    assert begun(deciding.decide()) == [1]


def test_a_grammar_that_cannot_be_compiled_fails_its_request_alone() -> None:
    deciding = Deciding()
    deciding.ask(1, prompt_of(20), grammar="bad")
    deciding.ask(2, prompt_of(20, first=9))
    assert deciding.admission.compile_grammars() == []
    deciding.side.grammars.futures["bad"].set_exception(ValueError("no such rule"))
    [failed] = deciding.admission.compile_grammars()
    assert (failed.id, failed.message) == (1, "no such rule")


def test_a_chunk_shares_the_pass_of_a_decode_step_where_the_model_can() -> None:
    for mixes in (True, False):
        deciding = Deciding(mixes=mixes)
        deciding.running(1, prompt_of(30))
        deciding.ask(2, prompt_of(900, first=9))
        plans = [deciding.decide(), deciding.decide()]
        [plan] = [plan for plan in plans if plan.begin is not None]
        assert plan.mixed is mixes
        assert plan.decode


def test_a_prompt_to_be_scored_has_a_pass_of_its_own() -> None:
    deciding = Deciding()
    deciding.running(1, prompt_of(30))
    deciding.ask(2, prompt_of(90, first=9), prompt_logprobs=0)
    plans = [deciding.decide(), deciding.decide()]
    [plan] = [plan for plan in plans if plan.begin is not None]
    assert not plan.mixed


def test_prompts_begun_take_their_chunks_in_rotation() -> None:
    deciding = Deciding()
    for id_ in (1, 2):
        deciding.ask(id_, prompt_of(2000, first=id_ + 1000))
    chunks = []
    for _ in range(8):
        plan = deciding.decide()
        if plan.begin is not None:
            deciding.side.begin(plan)
        assert plan.chunk is not None
        chunks.append(plan.chunk.id)
    assert chunks[-4:] in ([1, 2, 1, 2], [2, 1, 2, 1])


def test_the_newest_give_their_places_up_before_the_limit_is_exceeded() -> None:
    deciding = Deciding(limit=2500)
    deciding.running(1, prompt_of(300))
    deciding.running(2, prompt_of(300, first=9))
    deciding.ask(3, prompt_of(50, first=11))
    for row in deciding.side.rows:
        row.launched += 1000
    plan = deciding.decide()
    assert plan.preempt == [2]
    assert begun(plan) == [], "nobody begins in a turn in which somebody has to go"
    deciding.side.rows = deciding.side.rows[:1]
    assert deciding.decide().preempt == []


def test_a_request_that_has_ended_is_not_taken_up_again_for_want_of_room() -> None:
    deciding = Deciding(limit=2500)
    for id_ in (1, 2, 3):
        deciding.running(id_, prompt_of(300, first=id_ + 1000))
    for row in deciding.side.rows:
        row.launched += 1000
    deciding.side.rows[2].done = True
    assert deciding.decide().preempt == [2]


def test_a_single_request_is_never_preempted() -> None:
    deciding = Deciding(limit=100)
    deciding.running(1, prompt_of(300))
    assert deciding.decide().preempt == []


def test_the_prefix_cache_gets_what_requests_leave() -> None:
    limit = PREFIX_LIMIT + 1000
    deciding = Deciding(limit=limit)
    assert deciding.decide().prefix_limit == PREFIX_LIMIT
    deciding.ask(1, prompt_of(2000))
    left = deciding.decide().prefix_limit
    assert limit - 3 * 2001 <= left < PREFIX_LIMIT


def test_after_a_lack_of_memory_less_is_admitted() -> None:
    deciding = Deciding(limit=4000)
    deciding.running(1, prompt_of(300))
    deciding.ask(2, prompt_of(300, first=9))
    for _ in range(3):
        deciding.backoff.lower()
    assert not any(begun(deciding.decide()) for _ in range(3))


def test_a_suspect_runs_alone() -> None:
    deciding = Deciding()
    deciding.suspects |= {1}
    for id_ in (1, 2):
        deciding.ask(id_, prompt_of(20, first=id_ + 1000))
    plan = deciding.decide()
    assert begun(plan) == [1]
    deciding.side.begin(plan)
    assert not any(begun(deciding.decide()) for _ in range(3))
    deciding.suspects.clear()
    assert [2] in [begun(deciding.decide()) for _ in range(2)]


def test_a_dropped_request_makes_room_in_the_same_turn() -> None:
    deciding = Deciding()
    for id_ in range(4):
        deciding.running(id_, prompt_of(30, first=id_ + 1000))
    deciding.ask(9, prompt_of(30))
    assert not any(begun(deciding.decide()) for _ in range(2))
    plans = [deciding.decide(0), deciding.decide(0)]
    assert [9] in [begun(plan) for plan in plans]
    assert all(plan.drop == [0] for plan in plans)


def test_chunks_are_sized_by_what_chunks_took() -> None:
    deciding = Deciding(chunk=None)
    deciding.running(1, prompt_of(30))
    outcome = Outcome()
    outcome.step_seconds = 0.01
    outcome.chunk = ChunkTime(100, 50, 0.1, mixed=True, behind_step=False)
    plan = deciding.decide()
    for _ in range(20):
        deciding.planner.learn(plan, outcome)
    deciding.ask(2, prompt_of(2000, first=9))
    sizes = [plan.chunk.tokens for plan in (deciding.decide(), deciding.decide()) if plan.chunk]
    assert sizes
    assert sizes[0] == pytest.approx(2.5 * 0.01 / 0.001, abs=16)


@pytest.mark.parametrize("share", [0.1, 1.5])
def test_a_draft_model_catches_up_where_its_guesses_would_pay(share: float) -> None:
    deciding = Deciding()
    deciding.side.drafts = SimpleNamespace(held=lambda _: 0)
    deciding.running(1, prompt_of(900), max_tokens=500)
    [row] = deciding.side.rows
    row.guesser = Drafted(Lookup(Experience(), row.prompt), row.prompt, CONTEXT, 1 << 20)
    idle = deciding.decide()
    assert idle.catch_up is None, "what a step takes is not known yet"
    outcome = Outcome()
    outcome.step_seconds, outcome.rows = 0.1, 1
    outcome.drafted = DraftTime(1, 4, 4 * 0.1 * share)
    for _ in range(3):
        deciding.planner.learn(idle, outcome)
    wanted = deciding.decide().catch_up
    assert wanted == (Chunk(1, CHUNK) if share < 1 else None)
    row.guesser.behind = 1
    plan = deciding.decide()
    assert plan.catch_up is None
    assert bool(plan.guess) == (share < 1)


def test_a_draft_model_does_not_catch_up_beside_a_prompt() -> None:
    deciding = Deciding()
    deciding.side.drafts = SimpleNamespace(held=lambda _: 0)
    deciding.running(1, prompt_of(900), max_tokens=500)
    [row] = deciding.side.rows
    row.guesser = Drafted(Lookup(Experience(), row.prompt), row.prompt, CONTEXT, 1 << 20)
    outcome = Outcome()
    outcome.step_seconds, outcome.rows = 0.1, 1
    idle = deciding.decide()
    for _ in range(3):
        deciding.planner.learn(idle, outcome)
    assert deciding.decide().catch_up is not None
    deciding.ask(2, prompt_of(900, first=9))
    plans = [deciding.decide(), deciding.decide()]
    assert any(plan.chunk for plan in plans)
    assert not any(plan.catch_up for plan in plans if plan.chunk)


def test_a_chunk_has_no_more_tokens_than_there_is_memory_for_beside_those_before_it() -> None:
    pace = Pace(None, fits=lambda position: 100 if position < 1000 else 1)
    for times in (pace.chunks, pace.mixed):
        times.measured(tokens=100, keys=50.0, seconds=0.01)
    pace.stepped(1.0)
    assert pace.chunk(0, decoding=True) == 100
    assert pace.chunk(2000, decoding=True) == SMALLEST_CHUNK
    assert pace.mixed_chunk(0, rows=4) == 100
    assert pace.mixed_chunk(2000, rows=4) <= SMALLEST_CHUNK
    free = Pace(None)
    free.chunks = pace.chunks
    free.stepped(1.0)
    assert 100 < free.chunk(0, decoding=True) <= LARGEST_CHUNK
