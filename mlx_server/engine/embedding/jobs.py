"""Embedding requests in turns between callers, and which texts are computed together."""

import bisect
from collections.abc import Iterable

from mlx_server.engine.protocol import Embed

MOST_PADDING = 1.25
"""Largest factor by which padding may grow the work."""


class Job:
    """`left` are the indexes of texts without a vector, the longest first.

    `served` is the number of the last pass with one of them, at first of the last before it.
    """

    def __init__(self, request: Embed, served: int) -> None:
        self.request = request
        self.served = served
        self.begun = False
        wanted = (index for index, text in enumerate(request.texts) if text)
        self.left = sorted(wanted, key=self.length, reverse=True)

    def length(self, index: int) -> int:
        """In tokens."""
        return len(self.request.texts[index])

    def second(self, index: int) -> int:
        seconds = self.request.seconds
        return seconds[index] if seconds else self.length(index)


class Pass:
    """Texts of up to `budget` tokens, padded to the longest, the first."""

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
    def texts(self) -> list[list[int]]:
        return [job.request.texts[index] for job, index in self.chosen]

    @property
    def seconds(self) -> list[int]:
        """Where the second texts of pairs begin; behind the end where there is none."""
        return [job.second(index) for job, index in self.chosen]

    @property
    def jobs(self) -> dict[int, Job]:
        return {job.request.id: job for job, _ in self.chosen}

    def fill(self, job: Job) -> None:
        """Add texts no longer than the first, longest first, while they fit."""
        lengths = [-job.length(index) for index in job.left]
        start = bisect.bisect_left(lengths, -self._longest) if self.chosen else 0
        for index in job.left[start:]:
            if not self._fits(job.length(index)):
                return
            self.chosen.append((job, index))
            self._tokens += job.length(index)
            self._longest = max(self._longest, job.length(index))

    def _fits(self, length: int) -> bool:
        if not self.chosen:
            return True
        size = self._longest * (len(self.chosen) + 1)
        return size <= min(self._budget, MOST_PADDING * (self._tokens + length))


class JobQueue:
    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._served: dict[str, int] = {}
        """As `Job.served`, by caller."""
        self._passes = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def begun(self) -> int:
        return sum(job.begun for job in self._jobs.values())

    def add(self, request: Embed) -> None:
        if not self._jobs:
            self._served.clear()
        self._jobs[request.id] = Job(request, self._passes)
        self._served.setdefault(request.caller, self._passes)

    def remove(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self._jobs.pop(id_, None)

    def next_pass(self, budget: int) -> Pass:
        """Texts of the request whose turn it is, and of others as many as fit with them."""
        chosen = Pass(budget)
        for job in sorted(self._jobs.values(), key=self._rank):
            chosen.fill(job)
        return chosen

    def finish(self, done: Pass) -> None:
        self._passes += 1
        computed = {(job.request.id, index) for job, index in done.chosen}
        for id_, job in done.jobs.items():
            job.left = [index for index in job.left if (id_, index) not in computed]
            job.served = self._served[job.request.caller] = self._passes
        self.remove(id_ for id_, job in done.jobs.items() if not job.left)

    def _rank(self, job: Job) -> tuple[int, int, int]:
        return job.request.priority, self._served[job.request.caller], job.served
