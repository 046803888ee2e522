"""What an embedding engine does next: which texts go through the model together.

It takes the place of the scheduler in the engine's loop. A turn is one forward pass over texts of
similar length, of one request or of several, and never over more tokens than memory was promised
for.
"""

import bisect
import time
from collections.abc import Iterator, Sequence

from mlx_server.engine.embedding.backend import EmbeddingBackend
from mlx_server.engine.memory import DeviceMemory
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
"""Of a pass, padding included, unless it is one text; the footprint reckons with as many."""
LEAST_TOKENS = 64
PASS_SECONDS = 0.5
"""How long a pass may take: what an abort may have to wait for."""
MOST_PADDING = 1.25
"""Texts go together while padding makes the work no more than this times as large."""
SPEED_WEIGHT = 0.3
NO_PREFIXES = PrefixStats(blocks=0, bytes=0, prompt_tokens=0, cached_tokens=0)


class Job:
    """A request; `left` are the indexes of the texts to be computed, the longest first.

    `served` is the number of the pass that last had one of them, or that ran when it arrived.
    """

    def __init__(self, request: Embed, served: int) -> None:
        self.request = request
        self.served = served
        self.begun = False
        wanted = (index for index, text in enumerate(request.texts) if text)
        self.left = sorted(wanted, key=self.length, reverse=True)

    def length(self, index: int) -> int:
        """Tokens of a text."""
        return len(self.request.texts[index])


class Pass:
    """Texts that go through the model together, padded to the longest, which comes first."""

    def __init__(self, budget: int) -> None:
        self.chosen: list[tuple[Job, int]] = []
        self._budget = budget
        self._longest = 0
        self._tokens = 0

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return self._longest * len(self.chosen)

    @property
    def jobs(self) -> dict[int, Job]:
        """The requests that the texts belong to, by id."""
        return {job.request.id: job for job, _ in self.chosen}

    def fill(self, job: Job) -> None:
        """Take the longest of the job's texts that are no longer than the first, while they fit."""
        lengths = [-job.length(index) for index in job.left]
        start = bisect.bisect_left(lengths, -self._longest) if self.chosen else 0
        for index in job.left[start:]:
            if not self._takes(job.length(index)):
                return
            self.chosen.append((job, index))
            self._tokens += job.length(index)
            self._longest = max(self._longest, job.length(index))

    def _takes(self, length: int) -> bool:
        if not self.chosen:
            return True
        size = self._longest * (len(self.chosen) + 1)
        return size <= min(self._budget, MOST_PADDING * (self._tokens + length))


class Embedder:
    """Owns every request of an embedding engine from its arrival to its last vector."""

    def __init__(self, model: EmbeddingBackend, memory: DeviceMemory) -> None:
        self.model = model
        self.memory = memory
        self.pace = Pace(None)
        self.kv_limit = 0
        self.longest_sequence = model.context_length
        self._jobs: dict[int, Job] = {}
        self._pass = Pass(0)
        self._served: dict[str, int] = {}
        """The same by caller: callers take turns, and so do the requests of each."""
        self._passes = 0
        self._most = MOST_TOKENS
        """Tokens of a pass; fewer after one has failed."""
        self._token_seconds = 0.0
        self._longest_turn = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def add(self, request: Embed | Generate) -> Failed | None:
        """Queue a request; says why when it can never be computed."""
        if isinstance(request, Generate):
            return Failed(request.id, "this model makes vectors and generates nothing")
        if problem := self._problem(request):
            return Failed(request.id, problem)
        self._jobs[request.id] = Job(request, self._passes)
        self._served.setdefault(request.caller, self._passes)
        return None

    def abort(self, ids: Sequence[int]) -> None:
        """Forget these requests."""
        for id_ in ids:
            self._jobs.pop(id_, None)

    def turn(self) -> Iterator[Tokens | Begun]:
        """One pass; yields what begins with it, and the vectors that come of it."""
        self._pass = self._next_pass()
        if new := [id_ for id_, job in self._pass.jobs.items() if not job.begun]:
            yield Begun(new)
        started = time.perf_counter()
        rows = self._computed()
        self._learn(time.perf_counter() - started)
        yield Tokens(rows)

    def recover(self, error: Exception) -> list[Failed]:
        """Go on after a turn that raised `error`.

        Half as much is tried at once, until the text is alone that cannot be computed.
        """
        self.memory.release()
        if len(self._pass.chosen) > 1:
            self._most = self._pass.size // 2
            return []
        [id_] = self._pass.jobs
        del self._jobs[id_]
        return [Failed(id_, f"{type(error).__name__}: {error}")]

    def warm_up(self) -> None:
        """Compute a small text, so that kernels are compiled and the pace is known."""
        self.add(Embed(id=0, texts=[[0] * min(LEAST_TOKENS, self.model.context_length)]))
        while self.busy:
            for _ in self.turn():
                continue
        self.release()

    def release(self) -> None:
        """Give freed buffers back when nothing runs, or when too many have gathered."""
        if not self.busy:
            self._served.clear()
            self.model.release()
            self.memory.release()
            self.memory.trim()
        elif self.memory.read().cache > self.memory.cache_limit:
            self.memory.release()

    def close(self) -> None:
        """Nothing is kept that would have to be written."""

    def stats(self) -> Stats:
        """The present figures."""
        running = sum(job.begun for job in self._jobs.values())
        return Stats(
            running=running,
            prefilling=0,
            waiting=len(self._jobs) - running,
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
        if request.dimensions is not None and not 0 < request.dimensions <= self.model.width:
            return f"a vector has {self.model.width} dimensions"
        known = range(self.model.vocab_size)
        strange = (token for text in request.texts for token in text if token not in known)
        if (token := next(strange, None)) is not None:
            return f"token {token} is not in the model's vocabulary of {len(known)}"
        return None

    def _next_pass(self) -> Pass:
        """Texts of the request whose turn it is, and as many of others' as go well with them."""
        chosen = Pass(self._budget())
        for job in sorted(self._jobs.values(), key=self._turn_of):
            chosen.fill(job)
        return chosen

    def _turn_of(self, job: Job) -> tuple[int, int, int]:
        """What comes first has the least; of equals, what arrived first."""
        return job.request.priority, self._served[job.request.caller], job.served

    def _budget(self) -> int:
        if not self._token_seconds:
            return LEAST_TOKENS
        in_time = int(PASS_SECONDS / self._token_seconds)
        return min(self._most, max(LEAST_TOKENS, in_time))

    def _computed(self) -> list[Row]:
        """Take the pass through the model; returns what each of its requests gets."""
        jobs, chosen = self._pass.jobs, self._pass.chosen
        for job in jobs.values():
            job.begun = True
        vectors = self.model.vectors([job.request.texts[index] for job, index in chosen])
        made: dict[int, list[tuple[int, bytes]]] = {id_: [] for id_ in jobs}
        for (job, index), vector in zip(chosen, vectors, strict=True):
            done = self.model.finished(vector, job.request.dimensions)
            made[job.request.id].append((index, done))
        return [self._row(jobs[id_], pairs) for id_, pairs in made.items()]

    def _row(self, job: Job, vectors: list[tuple[int, bytes]]) -> Row:
        done = {index for index, _ in vectors}
        job.left = [index for index in job.left if index not in done]
        job.served = self._served[job.request.caller] = self._passes + 1
        if not job.left:
            del self._jobs[job.request.id]
        return Row(job.request.id, [], None if job.left else "stop", vectors=vectors)

    def _learn(self, seconds: float) -> None:
        """The pass took so long."""
        self._passes += 1
        self._most = min(MOST_TOKENS, 2 * self._most)
        self._longest_turn = max(self._longest_turn, seconds)
        self.pace.stepped(seconds)
        spent = seconds / self._pass.size
        usual = self._token_seconds or spent
        self._token_seconds = usual + SPEED_WEIGHT * (spent - usual)
