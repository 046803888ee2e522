"""One pass that draws several tokens a row: a guess is accepted as far as it equals the draws.

The draw at each position is the one that would have been made there anyway, so guesses change
speed and nothing else (sample and match, at any temperature).
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import NamedTuple, cast

import mlx.core as mx
from msgspec import structs

from mlx_server.engine.grammar.masks import MaskThread
from mlx_server.engine.protocol import Failed, Logprobs, Row, Sampling
from mlx_server.engine.run import kv
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.drafted import Drafted
from mlx_server.engine.run.groups import Groups
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.store import logprob_entries
from mlx_server.engine.sampling.sampler import Draw
from mlx_server.engine.sequence import Sequence

Guesses = Mapping[int, list[int]]
"""By the id of a request."""


class Verified(NamedTuple):
    """The rows drawn, requests that cannot go on, and how many tokens were taken (by the ids of
    rows), computed, guessed, and accepted.
    """

    rows: list[Row]
    failed: list[Failed]
    taken: dict[int, int]
    tokens: int
    guessed: int
    accepted: int


class Place:
    """A row at one of its next positions, as if the guess before it had come true."""

    in_flight = False

    def __init__(self, row: Sequence, guess: list[int]) -> None:
        self.row = row
        self.guess = guess
        self.sampling: Sampling = row.sampling
        self.prompt = row.prompt
        self.completion = row.completion + guess if guess else row.completion
        self.position = row.launched + len(guess)


class Verification:
    """The pass of `groups` with `guesses`, and a chunk of a prompt beside them; nothing of it may
    be under way before.
    """

    def __init__(
        self,
        model: Backend,
        groups: Groups[Sequence],
        guesses: Guesses,
        thread: MaskThread,
        chunk: Many[Part] = (),
    ) -> None:
        self._groups = groups
        self._guesses = guesses
        rows = groups.rows
        self._last = {row.id: last_token(row) for row in rows}
        self._replayed = [len(row.replay) for row in rows]
        fed = [[*row.replay, last_token(row), *guesses.get(row.id, [])] for row in rows]
        self.places = [
            Place(row, guess[:end])
            for row, guess in zip(rows, [guesses.get(row.id, []) for row in rows], strict=True)
            for end in range(len(guess) + 1)
        ]
        wanted = [place.row.request.logprobs for place in self.places]
        bound = [i for i, place in enumerate(self.places) if place.row.bound]
        answers = [tokens[len(row.replay) :] for row, tokens in zip(rows, fed, strict=True)]
        inputs = mx.array([token for tokens in answers for token in tokens], dtype=mx.uint32)
        sampler = model.ranks.sampler(self.places, inputs, model.vocab_size, wanted, bound)
        masks = model.ranks.masks(thread) if bound else None
        parts = _parts(groups, fed)
        widths = [part.tokens.shape[1] for part in parts for _ in range(part.tokens.shape[0])]
        # Models that cannot mix compute the padding too.
        self._tokens = len(self.places) if model.mixes else sum(widths)
        self._goes_back = model.goes_back
        self._widths = list(map(len, fed)) if self._goes_back else widths
        self._before = [kv.states(cache) for _, cache in groups.members()]
        logits, self._states, self.beside = model.step([*parts, *chunk], len(self.places))
        if any(row.replay for row in rows):
            logits = logits[_answering(fed, answers)]
        self._draw: Draw = sampler.launch(logits[:, -1, :].astype(mx.float32), masks)
        self._draw.start()
        self._masks = masks
        if masks is not None:
            firsts = {i: self.places[i].row for i in bound if not self.places[i].guess}
            masks.begin(
                {i: row.constraint for i, row in firsts.items() if row.constraint is not None},
                {i: guesses.get(row.id, []) for i, row in firsts.items()},
            )

    def finish(self) -> Verified:
        """Read what was drawn, and roll the caches back to it."""
        self._draw.finish()
        allowed = self._masks.wait() if self._masks is not None else None
        problems = allowed.problems if allowed is not None else {}
        failed: list[Failed] = []
        drawn = cast(list[int], self._draw.tokens.tolist())
        entries = self._entries(drawn)
        rows, at, accepted = [], 0, 0
        computed = 0
        taken: dict[int, int] = {}
        for row, replayed in zip(self._groups.rows, self._replayed, strict=True):
            computed += replayed
            guess = self._guesses.get(row.id, [])
            tokens = _accepted(drawn[at : at + len(guess) + 1], guess)
            problem = next(
                (problems[at + i] for i in range(len(tokens)) if at + i in problems), None
            )
            if problem is not None and not row.done:
                row.done = True
                failed.append(Failed(row.id, problem))
            if not row.done:
                self._keep_states(row, computed, len(tokens))
                told = row.accept(tokens, entries[at : at + len(tokens)])
                taken[row.id] = len(told.tokens)
                right = min(len(guess), len(told.tokens) - 1)
                accepted += right
                if isinstance(row.guesser, Drafted) and guess:
                    row.guesser.judge(len(guess), right)
                rows.append(structs.replace(told, guessed=len(guess), accepted=right))
            at += len(guess) + 1
            computed += len(guess) + 1
        self._roll_back(taken)
        guessed = len(self.places) - len(self._groups.rows)
        return Verified(rows, failed, taken, self._tokens, guessed, accepted)

    def _keep_states(self, row: Sequence, start: int, count: int) -> None:
        """For the model's head, those of `count` tokens from place `start` of the pass on."""
        if self._states is not None and row.unread is not None:
            row.unread.add(row.known - 1, self._states[start : start + count, 0])

    def _roll_back(self, taken: dict[int, int]) -> None:
        widths = zip(self._groups.rows, self._widths, strict=True)
        if not self._goes_back:
            self._groups.roll_back({row.id: width - taken.get(row.id, 1) for row, width in widths})
            return
        undone = {}
        for row, width in widths:
            guess = self._guesses.get(row.id, [])
            right = taken.get(row.id, 1) - 1
            undone[row.id] = width if right < len(guess) else 0
            row.replay = [*row.replay, self._last[row.id], *guess[:right]] if undone[row.id] else []
        self._groups.go_back(undone, self._before)

    def _entries(self, tokens: list[int]) -> list[Logprobs | None]:
        entries: list[Logprobs | None] = [None] * len(tokens)
        logprobs = self._draw.logprobs()
        if logprobs is None:
            return entries
        asked = [i for i, one in enumerate(self.places) if one.row.request.logprobs is not None]
        read = logprob_entries([tokens[i] for i in asked], logprobs)
        for i, e in zip(asked, read, strict=True):
            most = self.places[i].row.request.logprobs
            entries[i] = Logprobs(e.token, e.logprob, e.top[:most])
        return entries


def last_token(row: Sequence) -> int:
    return row.completion[-1] if row.completion else row.prompt[-1]


def _accepted(drawn: list[int], guess: list[int]) -> list[int]:
    """The draws up to the first that a guess did not foresee."""
    same = 0
    while same < len(guess) and guess[same] == drawn[same]:
        same += 1
    return drawn[: same + 1]


def _answering(fed: Many[list[int]], answers: Many[list[int]]) -> mx.array:
    """Where the last tokens of each row, as many as in `answers`, are among all that are `fed`."""
    places: list[int] = []
    start = 0
    for tokens, mine in zip(fed, answers, strict=True):
        start += len(tokens)
        places += range(start - len(mine), start)
    return mx.array(places)


def _parts(groups: Groups[Sequence], fed: Many[list[int]]) -> list[Part]:
    parts, start = [], 0
    for rows, cache in groups.members():
        mine = fed[start : start + len(rows)]
        counts = tuple(map(len, mine))
        width = max(counts)
        tokens = mx.array([one + [0] * (width - len(one)) for one in mine])
        parts.append(Part(tokens, cache, counts if min(counts) < width else None))
        start += len(rows)
    return parts
