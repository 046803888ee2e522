"""An embedding engine's turns: one forward pass over texts each."""

import time
from collections.abc import Iterator, Sequence

from mlx_server.engine.embedding.backend import EmbeddingBackend
from mlx_server.engine.embedding.jobs import JobQueue, Pass
from mlx_server.engine.faults import FailingTurns
from mlx_server.engine.idle import RELEASE_SECONDS, REST_SECONDS, Chore
from mlx_server.engine.memory import DeviceMemory, device_works
from mlx_server.engine.protocol import (
    Begun,
    Embed,
    Failed,
    Generate,
    PrefixStats,
    Row,
    Stats,
    Tokens,
)
from mlx_server.engine.schedule.pace import Pace

MOST_TOKENS = 2048
"""Per pass with several texts, with padding; the footprint assumes it."""
LEAST_TOKENS = 64
PASS_SECONDS = 0.5
"""What an abort may have to wait for."""
SPEED_WEIGHT = 0.3
NO_PREFIXES = PrefixStats(blocks=0, bytes=0, prompt_tokens=0, cached_tokens=0)


class PassBudget:
    """How many tokens a pass may have, from speed and failures."""

    def __init__(self) -> None:
        self._most = MOST_TOKENS
        self._token_seconds = 0.0

    @property
    def tokens(self) -> int:
        if not self._token_seconds:
            return LEAST_TOKENS
        in_time = int(PASS_SECONDS / self._token_seconds)
        return min(self._most, max(LEAST_TOKENS, in_time))

    def succeeded(self, tokens: int, seconds: float) -> None:
        self._most = min(MOST_TOKENS, 2 * self._most)
        measured = seconds / tokens
        usual = self._token_seconds or measured
        self._token_seconds = usual + SPEED_WEIGHT * (measured - usual)

    def failed(self, tokens: int) -> None:
        self._most = tokens // 2


class Embedder:
    def __init__(self, model: EmbeddingBackend, memory: DeviceMemory) -> None:
        self.model = model
        self.memory = memory
        self.pace = Pace(None)
        self.kv_limit = 0
        self.longest_sequence = model.context_length
        self._queue = JobQueue()
        self._budget = PassBudget()
        self._failing = FailingTurns(device_works)
        self._pass = Pass(0)
        self._longest_turn = 0.0

    @property
    def busy(self) -> bool:
        return len(self._queue) > 0

    def add(self, request: Embed | Generate) -> Failed | None:
        if isinstance(request, Generate):
            return Failed(request.id, "this model makes vectors and generates nothing")
        if problem := self._problem(request):
            return Failed(request.id, problem)
        self._queue.add(request)
        return None

    def abort(self, ids: Sequence[int]) -> None:
        self._queue.remove(ids)

    def take_tokenizer(self, content: bytes) -> None:
        """Nothing here is bound to a grammar."""

    def turn(self) -> Iterator[Tokens | Begun]:
        self.memory.wiring.wake()
        self._pass = self._queue.next_pass(self._budget.tokens)
        jobs = self._pass.jobs
        if new := [id_ for id_, job in jobs.items() if not job.begun]:
            yield Begun(new)
        for job in jobs.values():
            job.begun = True
        started = time.perf_counter()
        rows = self._compute(self._pass)
        seconds = time.perf_counter() - started
        self._budget.succeeded(self._pass.size, seconds)
        self._failing.worked()
        self.pace.stepped(seconds)
        self._longest_turn = max(self._longest_turn, seconds)
        yield Tokens(rows)

    def recover(self, error: Exception) -> list[Failed]:
        """Halves passes until the text that fails is alone. Raises DeviceGone."""
        several = len(self._pass.chosen) > 1
        self._failing.failed(error, smaller=several)
        self.memory.release()
        if several:
            self._budget.failed(self._pass.size)
            return []
        [id_] = self._pass.jobs
        self._queue.remove([id_])
        return [Failed(id_, f"{type(error).__name__}: {error}")]

    def warm_up(self) -> None:
        self.add(Embed(id=0, texts=[[0] * min(LEAST_TOKENS, self.model.context_length)]))
        while self.busy:
            for _ in self.turn():
                continue
        self.release()
        self.memory.release_all()

    def release(self) -> None:
        """Let go of what has no use before the next turn."""
        if not self.busy:
            self.model.release()
        self.memory.release_excess()

    def chores(self) -> list[Chore]:
        return [
            Chore(RELEASE_SECONDS, self.memory.release_all),
            Chore(REST_SECONDS, self.memory.wiring.rest),
        ]

    def close(self) -> None:
        self.memory.wiring.close()

    def stats(self) -> Stats:
        running = self._queue.begun
        return Stats(
            running=running,
            prefilling=0,
            waiting=len(self._queue) - running,
            step_seconds=self.pace.step_seconds,
            kv_bytes=0,
            preempted=0,
            prefix=NO_PREFIXES,
            memory=self.memory.read(),
            longest_turn=self._longest_turn,
        )

    def _problem(self, request: Embed) -> str | None:
        longest = max(map(len, request.texts), default=0)
        if longest == 0:
            return "there is no text"
        if longest > self.model.context_length:
            return f"a text of {longest} tokens exceeds the context of {self.model.context_length}"
        if request.seconds and len(request.seconds) != len(request.texts):
            return "the pairs are incomplete"
        if request.dimensions is not None and not 0 < request.dimensions <= self.model.width:
            return f"a vector has {self.model.width} dimensions"
        known = range(self.model.vocab_size)
        strange = (token for text in request.texts for token in text if token not in known)
        if (token := next(strange, None)) is not None:
            return f"token {token} is not in the model's vocabulary of {len(known)}"
        return None

    def _compute(self, texts: Pass) -> list[Row]:
        made: dict[int, list[tuple[int, bytes]]] = {id_: [] for id_ in texts.jobs}
        vectors = self.model.vectors(texts.texts, texts.seconds)
        for (job, index), vector in zip(texts.chosen, vectors, strict=True):
            encoded = self.model.encode(vector, job.request.dimensions)
            made[job.request.id].append((index, encoded))
        self._queue.finish(texts)
        return [
            Row(id_, [], None if job.left else "stop", vectors=made[id_])
            for id_, job in texts.jobs.items()
        ]
