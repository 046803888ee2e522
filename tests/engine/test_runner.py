"""The running side on a real model, given Plans that are written by hand."""

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cache.disk import DiskCache
from mlx_server.engine.cache.prefix import BLOCK, PrefixCache, extend_keys
from mlx_server.engine.grammar.compiler import GrammarCompiler
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.plan import Begin, Chunk, Fetch, Outcome, Plan, Start
from mlx_server.engine.protocol import Generate, LoadOptions, Row, Sampling
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.batch import Step
from mlx_server.engine.run.runner import Runner
from tests.engine.conftest import request

LIMIT = 64 << 20
COUNT = 12
PROMPT = [(7 * i) % 400 for i in range(3 * BLOCK + 5)]


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> Backend:
    return Backend(tiny_model, LoadOptions(), DeviceMemory("50%", None))


@pytest.fixture
def runner(backend: Backend) -> Runner:
    return runner_of(backend)


def runner_of(backend: Backend, limit: int = LIMIT) -> Runner:
    grammars = GrammarCompiler(backend.path, backend.vocab_size)
    return Runner(backend, PrefixCache(backend.layout, limit), grammars, 512)


def start(id_: int, prompt: list[int], max_tokens: int = COUNT, **more: Any) -> Start:
    keys: list[bytes] = []
    extend_keys(keys, prompt)
    return Start(msgspec.structs.replace(request(prompt, max_tokens, **more), id=id_), keys)


def plan(**parts: Any) -> Plan:
    usual: dict[str, Any] = {
        "drop": [],
        "preempt": [],
        "load": [],
        "fetch": [],
        "begin": None,
        "prefix_limit": LIMIT,
        "decode": True,
        "chunk": None,
        "mixed": False,
    }
    return Plan(**usual | parts)


def begin(*starts: Start, until: int | None = None, tokens: int = 1000, **parts: Any) -> Plan:
    chunk = Chunk(starts[0].request.id, tokens)
    return plan(begin=Begin(list(starts), until), chunk=chunk, **parts)


def run(runner: Runner, *plans: Plan) -> tuple[list[Row], Outcome]:
    """All rows, and the last outcome."""
    rows: list[Row] = []
    outcome = Outcome()
    for one in plans:
        outcome = Outcome()
        for tokens in runner.run(one, outcome):
            rows += tokens.rows
    return rows, outcome


def rest(runner: Runner) -> list[Row]:
    """Decode until nothing is left."""
    rows = []
    while runner.busy:
        rows += run(runner, plan())[0]
    return rows


def tokens_of(rows: list[Row], id_: int) -> list[int]:
    return [token for row in rows if row.id == id_ for token in row.tokens]


def fails(*_: object) -> mx.array:
    raise RuntimeError("no memory")


def alone(path: Path, prompt: list[int]) -> list[int]:
    """mlx-lm's own greedy continuation."""
    model, _ = load_model(path)
    cache = make_prompt_cache(model)
    tokens, inputs = [], mx.array([prompt])
    for _ in range(COUNT):
        tokens.append(int(mx.argmax(model(inputs, cache=cache)[0, -1]).item()))
        inputs = mx.array([[tokens[-1]]])
    return tokens


def test_a_prompt_in_chunks_then_steps_gives_what_mlx_lm_gives(
    runner: Runner, tiny_model: Path
) -> None:
    plans = [begin(start(1, PROMPT), tokens=40), plan(chunk=Chunk(1, 33)), plan(chunk=Chunk(1, 99))]
    rows, _ = run(runner, *plans)
    assert tokens_of(rows + rest(runner), 1) == alone(tiny_model, PROMPT)


def test_prompts_that_begin_together_give_what_each_gives_alone(
    runner: Runner, tiny_model: Path
) -> None:
    prompts = {i: [(11 * i + 5 * j) % 400 for j in range(20 + i)] for i in range(3)}
    rows, outcome = run(runner, begin(*(start(i, prompt) for i, prompt in prompts.items())))
    assert outcome.joined_empty_batch
    rows += rest(runner)
    assert {i: tokens_of(rows, i) for i in prompts} == {
        i: alone(tiny_model, prompt) for i, prompt in prompts.items()
    }


def test_a_chunk_mixed_with_steps_changes_no_token(runner: Runner, tiny_model: Path) -> None:
    other = [(13 * i) % 400 for i in range(100)]
    rows, _ = run(runner, begin(start(1, PROMPT)), plan(), plan())
    mixed = [begin(start(2, other), tokens=30, mixed=True)]
    mixed += [plan(chunk=Chunk(2, 30), mixed=True) for _ in range(4)]
    more, outcome = run(runner, *mixed[:2])
    assert outcome.chunk is not None
    assert outcome.chunk.mixed
    rows += more + run(runner, *mixed[2:])[0] + rest(runner)
    assert tokens_of(rows, 1) == alone(tiny_model, PROMPT)
    assert tokens_of(rows, 2) == alone(tiny_model, other)


@pytest.mark.parametrize(
    ("eager", "order"), [(False, ["build", "read"]), (True, ["read", "build"])]
)
def test_a_mixed_step_is_built_while_the_device_computes_the_one_before(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, eager: bool, order: list[str]
) -> None:
    monkeypatch.setattr(backend, "eager", eager)
    runner = runner_of(backend)
    run(runner, begin(start(1, PROMPT)), plan(), plan())
    told = []
    build, read = backend.step, Step.read

    def built(*arguments: Any) -> mx.array:
        told.append("build")
        return build(*arguments)

    def was_read(step: Step) -> list[Row]:
        told.append("read")
        return read(step)

    monkeypatch.setattr(backend, "step", built)
    monkeypatch.setattr(Step, "read", was_read)
    run(runner, begin(start(2, [3] * 40), tokens=30, mixed=True))
    assert told == order


def test_a_preempted_request_comes_back_and_ends_the_same(runner: Runner, tiny_model: Path) -> None:
    rows, _ = run(runner, begin(start(1, PROMPT)), plan(), plan(), plan())
    gone, outcome = run(runner, plan(preempt=[1]))
    [again] = outcome.returned
    assert not runner.sequences
    assert again.request.prompt == PROMPT + tokens_of(rows, 1)
    assert again.reported
    rows += gone + rest(runner) + run(runner, begin(again))[0] + rest(runner)
    assert tokens_of(rows, 1) == alone(tiny_model, PROMPT)
    assert sum(row.cached is not None for row in rows) == 1


def test_a_shared_beginning_is_kept_for_those_that_branch_off(runner: Runner) -> None:
    first = start(1, PROMPT)
    _, outcome = run(runner, begin(first, until=2 * BLOCK))
    assert [again.request.id for again in outcome.returned] == [1]
    assert runner.prefix.known(first.keys) == 2
    rows, outcome = run(runner, begin(start(2, [*PROMPT[: 2 * BLOCK], 5, 6, 7])))
    assert outcome.prompts == [(2 * BLOCK + 3, 2 * BLOCK)]
    assert tokens_of(rows + rest(runner), 2)


def test_a_batch_that_has_emptied_feeds_nothing_of_it_to_the_next(runner: Runner) -> None:
    run(runner, begin(start(1, PROMPT)), begin(start(2, [3] * 40)))
    rest(runner)
    run(runner, begin(start(3, PROMPT)))
    assert runner.batch.inputs.tokens.tolist() == [PROMPT[-1]]


def test_a_dropped_request_leaves_nothing(runner: Runner) -> None:
    run(runner, begin(start(1, PROMPT)), begin(start(2, [3] * 300), tokens=10), plan())
    rows, _ = run(runner, plan(drop=[1, 2]), plan())
    assert not runner.busy
    assert runner.kv_bytes == 0
    assert not tokens_of(rows, 1)


def test_a_failed_turn_gives_back_all_that_ran(runner: Runner, tiny_model: Path) -> None:
    rows, _ = run(runner, begin(start(1, PROMPT)), plan(), plan())
    outcome = Outcome()
    [again] = runner.reset(outcome)
    assert not runner.busy
    rows += run(runner, begin(again))[0] + rest(runner)
    assert tokens_of(rows, 1) == alone(tiny_model, PROMPT)


def test_a_failed_turn_gives_back_a_request_whose_last_token_is_not_read(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = run(runner, begin(start(1, PROMPT)), begin(start(2, PROMPT, max_tokens=1)), plan())
    with monkeypatch.context() as broken:
        broken.setattr(runner.model, "step", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            run(runner, plan())
    again = runner.reset(Outcome())
    assert [one.request.id for one in again] == [1, 2]
    for one in again:
        rows += run(runner, begin(one))[0] + rest(runner)
    assert len(tokens_of(rows, 1)) == COUNT
    assert len(tokens_of(rows, 2)) == 1


def test_a_turn_that_fails_as_a_prompt_joins_the_batch_gives_it_back(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(runner, begin(start(1, PROMPT)), plan())
    with monkeypatch.context() as broken:
        broken.setattr(runner.batch, "join", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            run(runner, begin(start(2, PROMPT)))
    assert [one.request.id for one in runner.reset(Outcome())] == [1, 2]


def test_a_turn_that_fails_between_two_steps_has_told_what_it_had_read(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = run(runner, begin(start(1, PROMPT)), plan(), plan())
    monkeypatch.setattr(runner.batch, "leave", fails)
    monkeypatch.setattr(runner, "_leave", lambda *_: None)
    turn = runner.run(begin(start(2, PROMPT), tokens=20, mixed=True), Outcome())
    rows += next(turn).rows
    with pytest.raises(RuntimeError, match="no memory"):
        next(turn)
    again = runner.reset(Outcome())
    assert again[0].request.prompt == PROMPT + tokens_of(rows, 1)


def test_the_prefix_cache_keeps_to_the_limit_of_the_plan(runner: Runner) -> None:
    run(runner, begin(start(1, PROMPT)))
    rest(runner)
    assert runner.prefix.nbytes > 0
    run(runner, plan(prefix_limit=0))
    assert runner.prefix.nbytes == 0


def test_a_plan_survives_messagepack() -> None:
    generate = Generate(
        3, [1, 2], Sampling(seed=5, logit_bias={4: 1.5}), 9, grammar="x", logprobs=2
    )
    whole = Plan(
        drop=[1],
        preempt=[2],
        load=[4],
        fetch=[Fetch(5, [1, 2, 3], [b"a" * 16], [b"b" * 16])],
        begin=Begin([Start(generate, [b"\x00\xff" * 8], 32, True)], 64),
        prefix_limit=1 << 40,
        decode=True,
        chunk=Chunk(3, 77),
        mixed=True,
    )
    decode = msgspec.msgpack.Decoder(Plan).decode
    for one in (whole, plan(), begin(start(1, PROMPT), until=32)):
        assert decode(msgspec.msgpack.encode(one)) == one


def test_blocks_go_to_the_disk_when_of_use_or_without_room_and_at_the_end(
    backend: Backend, tmp_path: Path
) -> None:
    def on_disk() -> int:
        while disk.writer.waiting:
            threading.Event().wait(0.002)
        return len(list(tmp_path.rglob("*.safetensors")))

    disk = DiskCache(tmp_path, "c0ffee00", 1 << 30)
    prefix = PrefixCache(backend.layout, LIMIT, disk)
    runner = Runner(backend, prefix, GrammarCompiler(backend.path, backend.vocab_size), 512)
    run(runner, begin(start(1, PROMPT, 1)))
    rest(runner)
    assert prefix.save_used() is None
    assert on_disk() == 0, "written at once"
    other = [token + 1 for token in PROMPT]
    run(runner, begin(start(2, [*PROMPT[: 2 * BLOCK], 9, 9, 9], 1)), begin(start(3, other, 1)))
    rest(runner)
    assert prefix.save_used() is None
    assert on_disk() == 2, "the two blocks that served a second prompt"
    prefix.resize(prefix.nbytes // 2)
    run(runner, plan(), plan())
    rescued = on_disk()
    assert 2 < rescued < 6
    prefix.close()
    assert on_disk() == 6
