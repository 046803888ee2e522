"""A draft model's side of speculation: its rows, their caches, and the tokens that it draws.

Small and of the same vocabulary, it draws what the model may draw next, with the same uniforms, so
that the two agree as often as they can (Leviathan, Kalman and Matias 2023, with draws that match in
place of rejection sampling).
"""

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import cast

import mlx.core as mx

from mlx_server.engine.cache.prefix import PrefixCache, extend_keys, usable_blocks
from mlx_server.engine.cache.rows import MOST_GAPS
from mlx_server.engine.protocol import Sampling
from mlx_server.engine.run import kv
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.drafted import NEARLY, Drafted
from mlx_server.engine.run.groups import Groups
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.store import store_blocks
from mlx_server.engine.sampling.sampler import BatchSampler
from mlx_server.engine.sequence import Sequence

MOST_BESIDE = MOST_GAPS
"""Tokens that a row may catch up with at a time in a cache that it shares with others."""


class DraftRow:
    """A request in the draft's caches, which have `held` of its tokens and the guesses `ahead`."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.id = sequence.id
        self.prompt = sequence.prompt
        self.completion = sequence.completion
        self.keys = sequence.keys
        self.held = 0
        self.ahead: list[int] = []

    @property
    def computed(self) -> int:
        return self.held + len(self.ahead)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)

    def tokens(self, start: int, end: int | None = None) -> list[int]:
        """Those of prompt and completion from `start` on."""
        end, split = self.length if end is None else end, len(self.prompt)
        after = self.completion[max(0, start - split) : max(0, end - split)]
        return self.prompt[start:end] + after

    def settle(self) -> int:
        """Take for held what has come true of the guesses; returns how many have not."""
        pairs = zip(self.ahead, self.tokens(self.held), strict=False)
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        wrong = len(self.ahead) - right
        self.held, self.ahead = self.held + right, []
        return wrong

    def note(self) -> None:
        """Tell the request's guesser how far the cache is."""
        if isinstance(self.sequence.guesser, Drafted):
            self.sequence.guesser.behind = self.length - self.held


class CatchUp:
    """The first tokens of a row on their way into a cache of its own."""

    def __init__(self, model: Backend, prefix: PrefixCache, row: DraftRow) -> None:
        self.row = row
        self.cache = model.new_cache()
        self._model = model
        self._prefix = prefix
        tokens = row.tokens(0)
        extend_keys(row.keys, tokens)
        match = prefix.match(tokens, row.keys[: usable_blocks(tokens)])
        prefix.fill(self.cache, match)
        row.held = match.length

    def advance(self, budget: int) -> int:
        """Compute up to `budget` tokens more, all but the last; returns how many."""
        row = self.row
        budget = min(budget, max(1, self._model.tokens_within_scores(row.held)))
        end = min(row.held + budget, row.length - 1)
        chunk = row.tokens(row.held, end)
        if not chunk:
            return 0
        kv.reserve(self.cache, row.length - row.held, len(chunk))
        self._model.prefill(mx.array([chunk]), self.cache)
        row.held = end
        mx.eval(store_blocks(self._prefix, row, self.cache, 0, end))
        return len(chunk)


class Place:
    """A row at the position after its guess so far."""

    in_flight = False

    def __init__(self, row: DraftRow, guess: list[int]) -> None:
        self.sampling: Sampling = row.sequence.sampling
        self.prompt = row.prompt
        self.completion = row.completion + guess
        self.position = len(self.completion)


class Drafts:
    """Rows that a draft `model` guesses for; `vocab_size` is that of the model it guesses for.

    A row catches up in a cache of its own, then shares those of `Groups` with others like it.
    """

    def __init__(self, model: Backend, prefix: PrefixCache, vocab_size: int) -> None:
        self.model = model
        self.prefix = prefix
        self._vocab_size = vocab_size
        self._groups: Groups[DraftRow] = Groups(model, prefix)
        self._catching: dict[int, CatchUp] = {}

    @property
    def context_length(self) -> int:
        return self.model.context_length

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def prefix_bytes(self) -> int:
        return self.prefix.nbytes

    @property
    def nbytes(self) -> int:
        behind = sum(kv.cache_bytes(one.cache) for one in self._catching.values())
        return self._groups.nbytes + behind

    def held(self, id_: int) -> int:
        """Tokens of a request in the cache."""
        catching = (one.row for one in self._catching.values())
        rows = itertools.chain(self._groups.rows, catching)
        return next((row.computed for row in rows if row.id == id_), 0)

    def keep(self, ids: frozenset[int]) -> None:
        """Drop all other rows."""
        gone = frozenset(row.id for row in self._groups.rows) - ids
        if gone:
            self._settle()
            self._groups.remove(gone)
        for id_ in self._catching.keys() - ids:
            del self._catching[id_]

    def clear(self) -> None:
        """Forget all arrays."""
        self._groups = Groups(self.model, self.prefix)
        self._catching.clear()
        self.prefix.clear()

    def catch_up(self, sequence: Sequence, budget: int) -> tuple[int, float]:
        """Compute up to about `budget` tokens of a request that the cache lacks; returns how many,
        and how many keys each attended to on average.
        """
        row = next((row for row in self._groups.rows if row.id == sequence.id), None)
        if row is not None:
            count = self._catch_up_beside(row, budget)
        else:
            row, count = self._catch_up_alone(sequence, budget)
        row.note()
        return count, row.held - count / 2

    def guess(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        """Up to `most` tokens that the draft draws next, by the ids of rows that have caught up."""
        self._settle()
        rows = [row for row in self._groups.rows if most.get(row.id) and row.held < row.length]
        if not rows:
            return {}
        unseen = {row.id: row.tokens(row.held) for row in rows}
        fed = mx.array([token for row in rows for token in unseen[row.id]])
        logits = self._feed(fed, {id_: len(tokens) for id_, tokens in unseen.items()})
        for row in rows:
            row.held = row.length
            row.note()
        return draw_ahead(rows, most, logits, self._step)

    def resize(self, limit: int, beside: int) -> int:
        """Keep prefixes in a part of `limit` bytes, and as many tokens of them as what is kept at
        `beside` bytes a token in the rest; returns the part.
        """
        if self.prefix.layout.obstacle is not None:
            return 0
        mine = self.prefix.layout.bytes_per_token
        share = limit * mine // (mine + beside)
        self.prefix.resize(share)
        return share

    def forget_prefixes(self) -> None:
        self.prefix.clear()

    def _settle(self) -> None:
        self._groups.roll_back({row.id: row.settle() for row in self._groups.rows})

    def _catch_up_alone(self, sequence: Sequence, budget: int) -> tuple[DraftRow, int]:
        known = self._catching.get(sequence.id)
        one = known or CatchUp(self.model, self.prefix, DraftRow(sequence))
        self._catching[sequence.id] = one
        count = one.advance(budget)
        if one.row.length - one.row.held <= NEARLY:
            del self._catching[sequence.id]
            self._groups.add([one.row], self.model.caches.merge([one.cache]))
        return one.row, count

    def _catch_up_beside(self, row: DraftRow, budget: int) -> int:
        self._settle()
        start = row.held
        end = min(start + min(budget, MOST_BESIDE), row.length - 1)
        if end <= start:
            return 0
        mx.eval(self._feed(mx.array(row.tokens(start, end)), {row.id: end - start}))
        row.held = end
        return end - start

    def _step(self, rows: Many[DraftRow], tokens: mx.array) -> mx.array:
        """Feed a token to each row."""
        return self._feed(tokens, {row.id: 1 for row in rows})

    def _feed(self, tokens: mx.array, counts: Mapping[int, int]) -> mx.array:
        """Compute `tokens` (all,), of which rows have `counts` by their ids, in the rows' order;
        logits (rows with any, vocab) after the last of each.
        """
        parts, padding, start = [], {row.id: 0 for row in self._groups.rows}, 0
        for rows, cache in self._groups.members():
            mine = tuple(counts.get(row.id, 0) for row in rows)
            width = max(mine)
            if width:
                places = places_of(mine, width, start, tokens.size - 1)
                part = Part(tokens[places], cache, mine if min(mine) < width else None)
                parts.append(part)
                start += sum(mine)
                padding |= {row.id: width - count for row, count in zip(rows, mine, strict=True)}
        logits = self.model.last_logits(parts).astype(mx.float32)
        self._groups.roll_back(padding)
        return _fitted(logits, self._vocab_size)


Step = Callable[[Many[DraftRow], mx.array], mx.array]
"""Computes a token more (rows,) of each row; gives logits (rows, vocab) after it."""


def draw_ahead(
    rows: Many[DraftRow], most: Mapping[int, int], logits: mx.array, step: Step
) -> dict[int, list[int]]:
    """Up to `most` tokens to come, by the ids of rows; `logits` (rows, vocab) give the first."""
    guesses: dict[int, list[int]] = {row.id: [] for row in rows}
    while True:
        left = [most[row.id] - len(guesses[row.id]) for row in rows]
        drawn = draw(rows, guesses, logits, min(left), step)
        for row, column in zip(rows, drawn, strict=True):
            row.ahead += column[:-1]
            guesses[row.id] += column
        rows = [row for row in rows if len(guesses[row.id]) < most[row.id]]
        if not rows:
            return guesses
        logits = step(rows, mx.array([guesses[row.id][-1] for row in rows]))
        for row in rows:
            row.ahead.append(guesses[row.id][-1])


def draw(
    rows: Many[DraftRow],
    guesses: Mapping[int, list[int]],
    logits: mx.array,
    count: int,
    step: Step,
) -> list[list[int]]:
    """The next `count` tokens of each row, of which all but the last are computed.

    A device draws and computes them without the host.
    """
    places = [Place(row, guesses[row.id]) for row in rows]
    inputs = mx.zeros(len(rows), dtype=mx.uint32)
    sampler = BatchSampler(places, inputs, logits.shape[1])
    drawn: list[mx.array] = []
    for number in range(count):
        if number:
            logits = step(rows, drawn[-1])
        one = sampler.launch(logits)
        one.start()
        one.finish()
        drawn.append(one.tokens)
        for place in places:
            place.position += 1
    return cast(list[list[int]], mx.stack(drawn, axis=1).tolist())


def places_of(counts: Many[int], width: int, start: int, last: int) -> mx.array:
    """(rows, width): where the tokens of each row are; what a row has too few of is any."""
    starts = [start, *(start + end for end in itertools.accumulate(counts))]
    return mx.array(
        [[min(starts[row] + place, last) for place in range(width)] for row in range(len(counts))]
    )


def _fitted(logits: mx.array, vocab_size: int) -> mx.array:
    """`logits` (rows, vocab) for another padding of the same vocabulary."""
    missing = vocab_size - logits.shape[1]
    if missing == 0:
        return logits
    if missing < 0:
        return logits[:, :vocab_size]
    return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
