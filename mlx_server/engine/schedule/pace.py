"""How long decode steps and chunks of prefill take here, and how large the next chunk may be."""

import math
from collections.abc import Callable

SMALLEST_CHUNK = 16
LARGEST_CHUNK = 2048
IDLE_CHUNK_SECONDS = 2.0
"""How long a chunk may take while nothing decodes: what an abort may have to wait for."""
STEPS_PER_CHUNK = 2.5
"""How many decode steps a chunk may last while streams run."""
TILE = 16
"""Rows of a matrix product; on a CPU 20 rows take as long as 32."""
EXCESS = 1.1
"""How far beyond its time a chunk may go to fill a tile."""
GATHER_STEPS = 10
"""Steps' time that a new batch may wait for prompts about to join it."""
LONGEST_BURST_SECONDS = 0.01
STEP_WEIGHT = 0.2
MOST_GROWTH = 1.25
"""Cap on tokens relative to the best speed seen: the fit may be wrong."""
FADING = 0.9
"""What a chunk's measurement counts when the next one is made."""
PRIOR_WEIGHT = 1e-3


class Pace:
    """How many prompt tokens a turn may compute, from how fast things have gone so far.

    `step_seconds` is a moving average over decode steps.
    """

    def __init__(
        self, fixed_chunk: int | None, fits: Callable[[int], int] = lambda _: LARGEST_CHUNK
    ) -> None:
        """`fits`: from a position to how many tokens a chunk may have there, however fast."""
        self.fixed_chunk = fixed_chunk
        self._fits = fits
        self.step_seconds = 0.0
        self.chunks = ChunkTimes()
        self.mixed = ChunkTimes()
        """By how much chunks make the step longer that computes them in the same pass."""
        self.drafting = ChunkTimes()
        """Of the draft model."""

    def stepped(self, seconds: float) -> None:
        previous = self.step_seconds or seconds
        self.step_seconds = previous + STEP_WEIGHT * (seconds - previous)

    def chunk(self, position: int, decoding: bool) -> int:
        """Tokens for the next chunk of a prompt of which `position` tokens are computed."""
        if self.fixed_chunk is not None:
            return self.fixed_chunk
        seconds = IDLE_CHUNK_SECONDS
        if decoding:
            seconds = min(seconds, STEPS_PER_CHUNK * self.step_seconds)
        tokens = self.chunks.tokens_within(seconds, position)
        return max(SMALLEST_CHUNK, min(self._most(position), tokens))

    def mixed_chunk(self, position: int, rows: int) -> int:
        """Tokens for a chunk in one pass with a decode step of `rows`; together they fill tiles."""
        if self.fixed_chunk is not None:
            return self.fixed_chunk
        seconds = min(IDLE_CHUNK_SECONDS, STEPS_PER_CHUNK * self.step_seconds)
        tokens = self.mixed.tokens_within(seconds, position)
        tiles = math.floor(EXCESS * (rows + tokens) / TILE)
        least = math.ceil((rows + 1) / TILE)
        return min(self._most(position), max(least, tiles) * TILE - rows)

    def draft_chunk(self, position: int) -> int:
        """Tokens for the next chunk of a draft model, beside streams: no longer than a step."""
        if self.fixed_chunk is not None:
            return self.fixed_chunk
        tokens = self.drafting.tokens_within(self.step_seconds, position)
        return max(SMALLEST_CHUNK, min(self._most(position), tokens))

    def _most(self, position: int) -> int:
        return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, self._fits(position)))

    def gather_seconds(self) -> float:
        return GATHER_STEPS * self.step_seconds

    def burst_seconds(self) -> float:
        """How long an idle engine waits for a request to follow another."""
        return min(LONGEST_BURST_SECONDS, self.step_seconds / 4)


class ChunkTimes:
    """Predicts a chunk's seconds as a + b · tokens + c · (tokens · keys each attends to).

    A least-squares fit of relative errors in which older chunks count less.
    """

    def __init__(self) -> None:
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._seconds_per_token = 0.0

    def measured(self, tokens: int, keys: float, seconds: float) -> None:
        features = [value / seconds for value in _features(tokens, keys)]
        for i, one in enumerate(features):
            self._targets[i] = FADING * self._targets[i] + one
            for j, other in enumerate(features):
                self._products[i][j] = FADING * self._products[i][j] + one * other
        per_token = seconds / tokens
        self._seconds_per_token = min(per_token, self._seconds_per_token or per_token)

    def tokens_within(self, seconds: float, position: int) -> int:
        """How many tokens after the first `position` a chunk of `seconds` can compute."""
        if not self._seconds_per_token:
            return 0
        most = int(MOST_GROWTH * seconds / self._seconds_per_token)
        fixed, token, pair = self._coefficients()
        left = seconds - fixed
        if left <= 0:
            return 0
        # token · n + pair · n · (position + n / 2) = left
        linear = token + pair * position
        root = math.sqrt(linear * linear + 2 * pair * left)
        return min(most, int(2 * left / (linear + root))) if linear + root else most

    def _coefficients(self) -> tuple[float, float, float]:
        prior = (0.0, self._seconds_per_token, 0.0)
        chosen = [0, 1, 2]
        while True:
            values = self._solve(chosen, prior)
            worst = min(chosen, key=lambda i: values[i])
            if values[worst] >= 0 or len(chosen) == 1:
                return values[0], max(0.0, values[1]), values[2]
            chosen.remove(worst)

    def _solve(self, chosen: list[int], prior: tuple[float, ...]) -> list[float]:
        """The fit by the `chosen` coefficients alone, drawn a little towards `prior`."""
        rows = []
        for i in chosen:
            weight = PRIOR_WEIGHT * (self._products[i][i] or 1.0)
            row = [self._products[i][j] + (weight if i == j else 0.0) for j in chosen]
            rows.append([*row, self._targets[i] + weight * prior[i]])
        for at, pivot in enumerate(rows):
            for row in rows[at + 1 :]:
                factor = row[at] / pivot[at]
                row[:] = [value - factor * above for value, above in zip(row, pivot, strict=True)]
        values = [0.0] * 3
        for at in reversed(range(len(rows))):
            *row, target = rows[at]
            target -= sum(row[k] * values[chosen[k]] for k in range(at + 1, len(chosen)))
            values[chosen[at]] = target / row[at]
        return values


def _features(tokens: int, keys: float) -> tuple[float, float, float]:
    return 1.0, float(tokens), tokens * keys
