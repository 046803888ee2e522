"""An engine's requests from arrival to last token: each turn decides, computes, and learns.

First come, first served, in turns between callers. A turn holds at most one chunk of prefill, sized
from measured speed so that running streams are never delayed by more than a few of their own steps,
and prompts take their chunks in rotation, so that a short one does not wait behind a long one.
"""

import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

from mlx_server.engine.cache.prefix import PrefixCache, extend_keys
from mlx_server.engine.cache.rows import MOST_GAPS
from mlx_server.engine.faults import DeviceGone, FailingTurns, is_out_of_memory
from mlx_server.engine.grammar.compiler import GrammarCompiler
from mlx_server.engine.idle import RELEASE_SECONDS, REST_SECONDS, Chore
from mlx_server.engine.memory import DeviceMemory, device_name, device_works
from mlx_server.engine.plan import Outcome, Plan, Start
from mlx_server.engine.protocol import (
    Begun,
    Failed,
    Generate,
    PrefixStats,
    Sampling,
    Stats,
    Tokens,
    total_memory,
)
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.drafts import MOST_BESIDE
from mlx_server.engine.run.groups import padded
from mlx_server.engine.run.lookup import MOST
from mlx_server.engine.run.runner import Runner
from mlx_server.engine.schedule import compiling
from mlx_server.engine.schedule.admission import Admission
from mlx_server.engine.schedule.backoff import KvBackoff
from mlx_server.engine.schedule.pace import SMALLEST_CHUNK, Pace
from mlx_server.engine.schedule.planner import Planner
from mlx_server.engine.schedule.request import WaitingRequest
from mlx_server.engine.schedule.room import KvRoom
from mlx_server.engine.schedule.waiting import WaitingQueue

PREPARE_SECONDS = 1.0
"""Idle time after which the engine gets ready for grammars."""
THREADS_WAIT = 0.02
"""Seconds between looks at the inbox while there is nothing to do but to wait for other threads."""


@dataclass
class Counts:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preempted: int = 0
    longest_turn: float = 0.0
    guessed: int = 0
    accepted: int = 0


class Scheduler:
    """Owns every request of an engine.

    `kv_limit` is in bytes, for running requests and the prefix cache together, and those of a
    `draft` model or of the model's head.
    """

    def __init__(
        self,
        model: Backend,
        memory: DeviceMemory,
        prefix: PrefixCache,
        *,
        max_batch: int,
        kv_limit: int,
        prefill_chunk: int | None,
        kv_share: float = 1.0,
        draft: Backend | None = None,
    ) -> None:
        self.model = model
        self.draft = draft
        self.memory = memory
        self.kv_limit = kv_limit
        beside = draft or model.head
        cost = model.kv_cost if beside is None else model.kv_cost.beside(beside.kv_cost)
        self.longest_sequence = cost.longest(kv_limit, model.context_length)
        grammars = GrammarCompiler(model.path, model.vocab_size)
        self.runner = Runner(model, prefix, grammars, self.longest_sequence, draft)
        self.waiting = WaitingQueue()
        self.suspects: set[int] = set()
        """Requests with which a turn has failed, and which have got nowhere since."""
        self.pace = Pace(prefill_chunk, model.tokens_within_scores)
        self.backoff = KvBackoff(kv_share)
        mixes = model.mixes and (beside is None or beside.mixes)
        lengths = padded(model.batching.decode, mixes=mixes)
        step = 1 + MOST + MOST_GAPS if model.guesses else 1
        step += MOST_BESIDE if beside is not None else 0
        self.room = KvRoom(cost, kv_limit, prefix.limit, self.backoff, lengths, step)
        self.admission = Admission(self.waiting, self.runner, self.room, self.suspects, max_batch)
        self.planner = Planner(self.runner, self.admission, self.room, self.pace)
        self.counts = Counts()
        self.failing = FailingTurns(device_works)
        self._drop: list[int] = []
        self._plan: Plan | None = None
        self._outcome = Outcome()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.runner.busy or self._drop)

    def add(self, request: Generate) -> Failed | None:
        problem = self._problem(request)
        if problem:
            return Failed(request.id, problem)
        keys: list[bytes] = []
        extend_keys(keys, request.prompt)
        self.waiting.add(WaitingRequest(Start(request, keys), self.longest_sequence))
        return None

    def abort(self, ids: Many[int]) -> None:
        """Forget these requests; the next turn frees what they hold."""
        self.waiting.remove(frozenset(ids))
        self._drop += ids

    def take_tokenizer(self, content: bytes) -> None:
        self.runner.grammars.take_tokenizer(content)

    def turn(self) -> Iterator[Tokens | Begun | Failed]:
        """One decode step and at most one chunk of prefill; yields what comes out of each."""
        started = time.perf_counter()
        self.memory.wiring.wake()
        self._plan, self._outcome = None, Outcome()
        yield from self._fail_unusable_grammars()
        plan, outcome = self.planner.decide(list(self._drop)), self._outcome
        self._plan = plan
        if plan.begin is not None:
            yield Begun([start.request.id for start in plan.begin.starts])
        for tokens in self.runner.run(plan, outcome):
            self.suspects.difference_update(row.id for row in tokens.rows)
            yield tokens
        yield from outcome.failed
        self._drop.clear()
        if outcome.computed:
            self.failing.worked()
        self.planner.learn(plan, outcome)
        self._account(plan, outcome)
        if not self.runner.busy:
            self.admission.await_threads(THREADS_WAIT)
        self.counts.longest_turn = max(self.counts.longest_turn, time.perf_counter() - started)

    def warm_up(self) -> None:
        """Run a small request, so that kernels are compiled and the pace is known."""
        if device_name() == "cuda":
            for request in compiling.requests(self.longest_sequence):
                self._answer([request])  # together they would share one pass
        prompt = [0] * (2 * SMALLEST_CHUNK + 1)
        small = Generate(id=0, prompt=prompt, sampling=Sampling(temperature=0), max_tokens=3)
        self._answer([small])
        self.runner.forget_prefixes()
        self.counts = Counts()
        self.release()
        self.memory.release_all()

    def _answer(self, requests: Many[Generate]) -> None:
        for request in requests:
            self.add(request)
        while self.busy:
            for _ in self.turn():
                continue

    def recover(self, error: Exception) -> list[Failed]:
        """Go on after a turn that raised `error`; returns the requests that are given up.

        Arrays cannot be trusted, so what had begun is computed again from its tokens, one request
        at a time. A request that fails again while it runs alone is given up. Raises DeviceGone, of
        several ranks always: the others cannot know where this one's turn failed.
        """
        if self.model.ranks.size > 1:
            raise DeviceGone(f"a turn of all ranks failed: {error}") from error
        self.failing.failed(error)
        outcome = self._outcome
        begun = self._begun(outcome)
        self.memory.release()
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            self.backoff.lower()
        guilty = begun
        if len(begun) > 1:
            guilty = [start for start in begun if start.request.id in self.suspects]
            if out_of_memory or len(guilty) > 1:
                guilty = []
        failed = {start.request.id for start in guilty}
        self._put_back([*outcome.returned, *(s for s in begun if s.request.id not in failed)])
        on_trial = {start.request.id for start in begun}
        self.suspects -= on_trial
        if not guilty:
            self.suspects |= on_trial
        reason = f"{type(error).__name__}: {error}"
        return [*outcome.failed, *(Failed(id_, reason) for id_ in sorted(failed))]

    def release(self) -> None:
        """Let go of what has no use before the next turn."""
        if not self.busy:
            self.runner.rest(self.room.left_for_prefixes([]))
        self.memory.release_excess()

    def chores(self) -> list[Chore]:
        return [
            Chore(RELEASE_SECONDS, self.memory.release_all),
            Chore(PREPARE_SECONDS, self.runner.grammars.prepare),
            *self.runner.prefix.chores(),
            Chore(REST_SECONDS, self._rest),
        ]

    def close(self) -> None:
        self.model.ranks.stop()
        self.runner.grammars.close()
        self.runner.mask_thread.close()
        self.runner.prefix.close()
        self.memory.wiring.close()
        self.model.ranks.close()

    def stats(self) -> Stats:
        running, prefix = len(self.runner.batch.rows), self.runner.prefix
        memory = self.memory.read()
        ranks = self.model.ranks.stats(memory)
        return Stats(
            running=running,
            prefilling=len(self.runner.sequences) - running,
            waiting=len(self.waiting),
            step_seconds=self.pace.step_seconds,
            kv_bytes=self.runner.kv_bytes,
            preempted=self.counts.preempted,
            prefix=PrefixStats(
                blocks=len(prefix),
                bytes=self.runner.prefix_bytes,
                prompt_tokens=self.counts.prompt_tokens,
                cached_tokens=self.counts.cached_tokens,
                disk=prefix.disk.figures(),
            ),
            memory=total_memory(one.memory for one in ranks if one.memory) if ranks else memory,
            longest_turn=self.counts.longest_turn,
            guessed=self.counts.guessed,
            accepted=self.counts.accepted,
            ranks=ranks,
        )

    def _rest(self) -> None:
        """Unwire the weights. Prefixes are left to the disk, since nothing else may be there when
        the weights are wired again.
        """
        if self.memory.wiring.wired:
            self.runner.forget_prefixes()
            self.model.ranks.sleep()
            self.memory.wiring.rest()

    def _problem(self, request: Generate) -> str | None:
        if not request.prompt:
            return "the prompt holds no token"
        if len(request.prompt) + min(request.max_tokens, 1) > self.longest_sequence:
            return (
                f"a prompt of {len(request.prompt)} tokens leaves no room in the "
                f"{self.longest_sequence} that the context and the KV cache hold"
            )
        known = range(self.model.vocab_size)
        for token in (*request.prompt, *request.sampling.logit_bias):
            if token not in known:
                return f"token {token} is not in the model's vocabulary of {len(known)}"
        return None

    def _fail_unusable_grammars(self) -> list[Failed]:
        failed = self.admission.compile_grammars()
        self.abort([failure.id for failure in failed])
        return failed

    def _account(self, plan: Plan, outcome: Outcome) -> None:
        self._put_back(outcome.returned)
        self.counts.preempted += len(plan.preempt)
        self.counts.guessed += outcome.guessed
        self.counts.accepted += outcome.accepted
        for prompt, cached in outcome.prompts:
            self.counts.prompt_tokens += prompt
            self.counts.cached_tokens += cached

    def _put_back(self, starts: Many[Start]) -> None:
        for start in reversed(starts):
            self.waiting.put_back(WaitingRequest(start, self.longest_sequence))

    def _begun(self, outcome: Outcome) -> list[Start]:
        begun = self.runner.reset(outcome)
        if self._plan is not None and self._plan.begin is not None and not outcome.begun:
            begun += self._plan.begin.starts
        if not begun:
            first = list(itertools.islice(self.waiting, 1))
            self.waiting.remove(frozenset(request.id for request in first))
            begun = [request.start for request in first]
        return [start for start in begun if start.request.id not in self._drop]
