"""Which requests may share a pass, found by trying: a row must get what it would get alone.

mlx-lm computes some families wrongly, or not at all, where rows are padded to one length, and some
caches can hold one sequence only.
"""

import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.protocol import Batching, Sharing
from mlx_server.engine.run import even, kv

LENGTHS = (11, 8, 9)
EVEN_LENGTHS = (8, 8, 8)
KNOWN = 4
"""Tokens of the first prompt that are in a cache when the prompts are computed together."""
SPLIT = 5
"""Where one of several equal prompts leaves a pass for good."""
STEPS = 2
"""Tokens after each prompt."""
TOKENS = 256
"""Ids up to this one are drawn."""
TRIALS = 3
"""With other tokens each. A mistake shows in all of them; an unlucky rounding does not."""
NOISE = 5.0
"""How many times further than the model's own noise a batch may be from its rows alone."""
LEAST, MOST = 1e-3, 0.2
"""Bounds of that, relative to how far logits are spread."""
TINY = 1e-30


class Model(Protocol):
    vocab_size: int

    def agreed(self, value: float) -> float: ...
    def common(self, obstacle: str | None) -> str | None: ...
    def new_cache(self) -> Cache: ...
    def forward(self, tokens: mx.array, cache: Cache) -> mx.array: ...
    def prefill(self, tokens: mx.array, cache: Cache) -> mx.array | None: ...


class RowCaches(NamedTuple):
    """How caches of rows become one, and how rows leave it."""

    merge: Callable[[list[Cache]], Cache]
    extend: Callable[[Cache, Cache], Cache]
    keep_rows: Callable[[Cache, list[int]], Cache]


PADDED = RowCaches(kv.merge, kv.extend, kv.keep_rows)
EVEN = RowCaches(even.merge, even.extend, even.keep_rows)


def row_caches(batching: Batching) -> RowCaches:
    return PADDED if batching.decode is Sharing.ANY else EVEN


def find(model: Model) -> Batching:
    """The most that works with `model`, and what was in the way of more."""
    trials = Trials(model, LENGTHS)
    decoding = trials.obstacle(_decode_padded)
    prefilling = decoding or trials.obstacle(_prefill_padded)
    if prefilling is None:
        return Batching(Sharing.ANY, Sharing.ANY)
    rest = Trials(model, EVEN_LENGTHS).obstacle(_share_even)
    sharing = Sharing.EQUAL if rest is None else Sharing.NONE
    reason = prefilling if rest is None else f"{prefilling}; {rest}"
    return Batching(sharing if decoding else Sharing.ANY, sharing, reason)


class Trial:
    """Rows of random tokens, computed alone: `begun` are their caches after their prompts, and
    `expected` the logits (STEPS, vocab) after.
    """

    def __init__(self, model: Model, lengths: tuple[int, ...], seed: int) -> None:
        rng = random.Random(seed)
        ids = min(model.vocab_size, TOKENS)
        self.model = model
        self.lengths = lengths
        self.rows = [[rng.randrange(ids) for _ in range(length + STEPS)] for length in lengths]
        self.begun: list[Cache] = []
        self.expected: list[mx.array] = []
        for row, length in zip(self.rows, lengths, strict=True):
            cache = model.new_cache()
            model.prefill(mx.array([row[:length]]), cache)
            self.begun.append(cache)
            self.expected.append(model.forward(mx.array([row]), model.new_cache())[0, -STEPS:])
        mx.eval(self.expected)

    def step(self, cache: Cache, rows: list[int], number: int) -> float:
        """Feed `cache` the tokens of a step; returns how far its rows are from what they get."""
        tokens = mx.array([[self.rows[row][self.lengths[row] + number]] for row in rows])
        logits = self.model.forward(tokens, cache)[:, -1]
        expected = mx.stack([self.expected[row][number] for row in rows])
        return self.model.agreed(distance(logits, expected))

    def limit(self) -> float:
        """How far from `expected` is no mistake: rows alone, token by token, are too."""
        caches = enumerate(copy.deepcopy(self.begun))
        noise = max(self.step(cache, [row], n) for row, cache in caches for n in range(STEPS))
        return min(MOST, max(LEAST, NOISE * noise))


def distance(found: mx.array, expected: mx.array) -> float:
    """Between logits (rows, vocab), relative to how far those expected of a row are spread, in the
    row that is furthest off.
    """
    one, other = _centered(found), _centered(expected)
    spread = mx.maximum(mx.linalg.norm(other, axis=-1), TINY)
    shares = mx.linalg.norm(one - other, axis=-1) / spread
    return cast(float, shares.max().item())


def _centered(logits: mx.array) -> mx.array:
    """What is not finite, such as tokens that a model rules out, becomes zero."""
    logits = logits.astype(mx.float32)
    logits = mx.where(mx.isfinite(logits), logits, 0.0)
    return logits - logits.mean(axis=-1, keepdims=True)


Check = Callable[[Trial], list[float]]


class Trials:
    """Up to `TRIALS` of them, with other tokens each."""

    def __init__(self, model: Model, lengths: tuple[int, ...]) -> None:
        self._model = model
        self._lengths = lengths
        self._made: list[Trial] = []

    def obstacle(self, check: Check) -> str | None:
        """Why `check` fails, if it does each time, in any rank."""
        return self._model.common(self._obstacle(check))

    def _obstacle(self, check: Check) -> str | None:
        furthest = 0.0
        for number in range(TRIALS):
            try:
                furthest, right = self._try(check, number)
            except Exception as error:  # noqa: BLE001
                # Each family has its own way to be at a loss.
                return f"{type(error).__name__}: {error}"
            if right:
                return None
        what = check.__name__.strip("_").replace("_", " ")
        return f"{what}: logits are off by {furthest:.2g} of their spread"

    def _try(self, check: Check, number: int) -> tuple[float, bool]:
        if number == len(self._made):
            self._made.append(Trial(self._model, self._lengths, seed=number))
        trial = self._made[number]
        distances = check(trial)
        right = all(one <= LEAST for one in distances)
        return max(distances), right or all(one <= trial.limit() for one in distances)


def _decode_padded(trial: Trial) -> list[float]:
    one, two, three = copy.deepcopy(trial.begun)
    cache = kv.extend(kv.merge([one, two]), kv.merge([three]))
    first = trial.step(cache, [0, 1, 2], 0)
    return [first, trial.step(kv.keep_rows(cache, [1, 2]), [1, 2], 1)]


def _prefill_padded(trial: Trial) -> list[float]:
    model = trial.model
    begun = [model.new_cache() for _ in LENGTHS]
    model.prefill(mx.array([trial.rows[0][:KNOWN]]), begun[0])
    missing = [row[:length] for row, length in zip(trial.rows, LENGTHS, strict=True)]
    missing[0] = missing[0][KNOWN:]
    cache = kv.merge(begun)
    prefill_padded(model, missing, cache)
    return [trial.step(cache, [0, 1, 2], 0)]


def _share_even(trial: Trial) -> list[float]:
    one, two, three = copy.deepcopy(trial.begun)
    cache = even.extend(even.merge([one, two]), three)
    decoded = [trial.step(cache, [0, 1, 2], 0)]
    decoded.append(trial.step(even.keep_rows(cache, [0, 2]), [0, 2], 1))
    model, length, cache = trial.model, trial.lengths[0], trial.model.new_cache()
    model.prefill(mx.array([row[:SPLIT] for row in trial.rows]), cache)
    cache = even.keep_rows(cache, [0, 2])
    model.prefill(mx.array([trial.rows[row][SPLIT:length] for row in (0, 2)]), cache)
    return [*decoded, *(trial.step(cache, [0, 2], number) for number in range(STEPS))]


def prefill_padded(model: Model, rows: list[list[int]], cache: Any) -> mx.array | None:
    """Compute rows of several lengths at once; `cache` is a batch cache. Returns what the model's
    `prefill` does.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    kv.pad_right(cache, lengths)
    states = model.prefill(mx.array([row + [0] * (longest - len(row)) for row in rows]), cache)
    kv.unpad(cache)
    return states
