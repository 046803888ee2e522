"""One pass that draws several tokens a row: a guess is accepted as far as it equals the draws.

The draw at each position is the one that would have been made there anyway, so guesses change
speed and nothing else (sample and match, at any temperature).
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import cast

import mlx.core as mx

from mlx_server.engine.grammar.masks import Masks, MaskThread
from mlx_server.engine.protocol import Failed, Logprobs, Row, Sampling
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.groups import Groups
from mlx_server.engine.run.store import logprob_entries
from mlx_server.engine.sampling.sampler import BatchSampler, Draw
from mlx_server.engine.sequence import Sequence

Guesses = Mapping[int, list[int]]
"""By the id of a request."""


class Place:
    """A row at one of its next positions, as if the guess before it had come true."""

    in_flight = False

    def __init__(self, row: Sequence, guess: list[int]) -> None:
        self.row = row
        self.sampling: Sampling = row.sampling
        self.prompt = row.prompt
        self.completion = row.completion + guess if guess else row.completion
        self.position = row.launched + len(guess)


class Verification:
    """The pass of `groups` with `guesses`; nothing of it may be under way before."""

    def __init__(
        self, model: Backend, groups: Groups, guesses: Guesses, thread: MaskThread
    ) -> None:
        self._groups = groups
        self._guesses = guesses
        rows = groups.rows
        fed = [[last_token(row), *guesses.get(row.id, [])] for row in rows]
        self.places = [
            Place(row, tokens[1:end])
            for row, tokens in zip(rows, fed, strict=True)
            for end in range(1, len(tokens) + 1)
        ]
        wanted = [place.row.request.logprobs for place in self.places]
        bound = [i for i, place in enumerate(self.places) if place.row.constraint is not None]
        inputs = mx.array([token for tokens in fed for token in tokens], dtype=mx.uint32)
        sampler = BatchSampler(self.places, inputs, model.vocab_size, wanted, bound)
        masks = Masks(thread) if bound else None
        logits, self._widths = _logits(model, groups, fed)
        self._draw: Draw = sampler.launch(logits.astype(mx.float32), masks)
        self._draw.start()
        self._masks = masks
        if masks is not None:
            constraints = ((i, self.places[i].row.constraint) for i in bound)
            masks.begin({i: one for i, one in constraints if one is not None})

    def finish(self) -> tuple[list[Row], list[Failed]]:
        """The rows drawn, with the caches rolled back to them, and requests that cannot go on."""
        self._draw.finish()
        allowed = self._masks.wait() if self._masks is not None else None
        failed = []
        for i, problem in allowed.problems.items() if allowed is not None else ():
            self.places[i].row.done = True
            failed.append(Failed(self.places[i].row.id, problem))
        drawn = cast(list[int], self._draw.tokens.tolist())
        entries = self._entries(drawn)
        rows, at = [], 0
        taken: dict[int, int] = {}
        for row in self._groups.rows:
            guess = self._guesses.get(row.id, [])
            if not row.done:
                tokens = _accepted(drawn[at : at + len(guess) + 1], guess)
                rows.append(row.accept(tokens, entries[at : at + len(tokens)]))
                taken[row.id] = len(rows[-1].tokens)
                if row.lookup is not None and guess:
                    row.lookup.judge(len(guess), taken[row.id] - 1)
            at += len(guess) + 1
        self._groups.roll_back(
            {row.id: self._widths[row.id] - taken.get(row.id, 1) for row in self._groups.rows}
        )
        return rows, failed

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


def _logits(
    model: Backend, groups: Groups, fed: Many[list[int]]
) -> tuple[mx.array, dict[int, int]]:
    """(places, vocab), and how many tokens each row's cache has got, padding included."""
    logits, widths, start = [], {}, 0
    for rows, cache in groups.members():
        mine = fed[start : start + len(rows)]
        width = max(map(len, mine))
        tokens = mx.array([one + [0] * (width - len(one)) for one in mine])
        flat = model.forward(tokens, cache).flatten(0, 1)
        index = [i * width + t for i, one in enumerate(mine) for t in range(len(one))]
        logits.append(flat if len(index) == flat.shape[0] else flat[mx.array(index)])
        widths.update({row.id: width for row in rows})
        start += len(rows)
    return logits[0] if len(logits) == 1 else mx.concatenate(logits), widths
