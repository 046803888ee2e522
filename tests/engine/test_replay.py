"""A run's Plans, replayed on another runner, give the same tokens."""

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.grammar.compiler import GrammarCompiler
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.plan import Outcome, Plan
from mlx_server.engine.protocol import Failed, Generate, LoadOptions, Sampling, Tokens
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.runner import Runner
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.support.tiny import build_tiny_model

LONG = 8
"""Of them, how many outgrow what admission expects of them."""
VOCABULARY = 400
GRAMMAR = "start: /[a-z ]{3,20}/"


def requests_of(rng: random.Random, count: int) -> Iterator[Generate]:
    """Greedy and sampled, short and long, with shared beginnings, grammars, log-probabilities."""
    shared = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (70, 150)]
    for id_ in range(count):
        length = 20 if id_ < LONG else rng.choice([1, 5, 20, 20, 60, 60, 300])
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        if id_ >= LONG and rng.random() < 0.4:
            prompt = rng.choice(shared) + prompt
        yield Generate(
            id=id_,
            prompt=prompt,
            sampling=Sampling(
                temperature=rng.choice([0.0, 0.7, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                seed=rng.randrange(1 << 32),
            ),
            max_tokens=400 if id_ < LONG else rng.choice([1, 4, 12, 30]),
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=0 if rng.random() < 0.05 else None,
            grammar=GRAMMAR if id_ >= LONG and rng.random() < 0.15 else None,
            caller=str(rng.randrange(5)),
            priority=0 if id_ < LONG else rng.choice([0, 0, 0, 1]),
        )


class Recorder(Runner):
    """Keeps each Plan as it would be sent to another machine."""

    plans: list[bytes]

    def run(self, plan: Plan, outcome: Outcome) -> Iterator[Tokens]:
        self.plans.append(msgspec.msgpack.encode(plan))
        return super().run(plan, outcome)


def collect(into: dict[int, list[int]], tokens: Tokens) -> None:
    for row in tokens.rows:
        into[row.id] += row.tokens


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.soak)])
def test_the_plans_of_mixed_requests_give_the_same_tokens_on_a_second_runner(
    tmp_path: Path, count: int
) -> None:
    memory = DeviceMemory("50%", None)
    backend = Backend(build_tiny_model(tmp_path / "tiny", context=1024), LoadOptions(), memory)
    limit = backend.kv_cost.bytes(3, 300)
    scheduler = Scheduler(
        backend,
        memory,
        PrefixCache(backend.layout, limit),
        max_batch=8,
        kv_limit=limit,
        prefill_chunk=64,
    )
    scheduler.runner.__class__ = Recorder
    plans = scheduler.runner.plans = []
    rng = random.Random(11)
    arriving = list(requests_of(rng, count))
    told: dict[int, list[int]] = {one.id: [] for one in arriving}
    aborted: set[int] = set()
    while scheduler.busy or arriving:
        for one in arriving[: rng.randrange(4) if len(arriving) < count else LONG]:
            assert scheduler.add(one) is None
            arriving.remove(one)
        running = [row.id for row in scheduler.runner.batch.rows if row.id >= LONG]
        if rng.random() < 0.05 and running:
            victim = rng.choice(running)
            aborted.add(victim)
            scheduler.abort([victim])
        for message in scheduler.turn():
            assert not isinstance(message, Failed)
            if isinstance(message, Tokens):
                collect(told, message)
    assert aborted
    assert scheduler.counts.preempted > 0
    assert scheduler.counts.cached_tokens > 0
    decode = msgspec.msgpack.Decoder(Plan).decode
    assert any(decode(plan).mixed for plan in plans), "no mixed step"

    grammars = GrammarCompiler(backend.path, backend.vocab_size)
    prefix = PrefixCache(backend.layout, limit)
    second = Runner(backend, prefix, grammars, scheduler.longest_sequence)
    replayed: dict[int, list[int]] = {id_: [] for id_ in told}
    for plan in plans:
        for tokens in second.run(decode(plan), Outcome()):
            collect(replayed, tokens)
    assert replayed == told
    assert not second.busy
