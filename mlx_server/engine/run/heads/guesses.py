"""A head's side of speculation: its rows, their caches, and the tokens that it draws.

It reads what the model has computed of a request and draws the token after the next one; for more
it goes on from its own states. What it has guessed so is forgotten before it reads again.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many

import mlx.core as mx

from mlx_server.engine.run import kv
from mlx_server.engine.run.drafted import NEARLY, Drafted
from mlx_server.engine.run.drafts import MOST_BESIDE, DraftRow, draw_ahead, places_of
from mlx_server.engine.run.groups import Groups
from mlx_server.engine.run.heads.head import Head
from mlx_server.engine.run.heads.unread import Unread
from mlx_server.engine.sequence import Sequence


class HeadRow(DraftRow):
    """A request in the head's cache, which `held` tokens of it and the guesses `ahead` are in."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence)
        self._unread = Unread() if sequence.unread is None else sequence.unread

    @property
    def behind(self) -> int:
        return len(self._unread)

    def settle(self) -> int:
        guessed, self.ahead = len(self.ahead), []
        return guessed

    def note(self) -> None:
        if isinstance(self.sequence.guesser, Drafted):
            self.sequence.guesser.behind = self.behind

    def read(self, most: int) -> tuple[list[int], mx.array]:
        """Up to `most` of the tokens to be read next, and the model's states before each (tokens,
        width); they are in the cache from now on.
        """
        start = self.length - self.behind
        states = self._unread.take(most)
        count = states.shape[0]
        self.held += count
        return self.tokens(start, start + count), states


Read = Mapping[int, tuple[list[int], mx.array]]
"""By the ids of rows, as of `HeadRow.read`."""


class Heads:
    """Rows for which a model's own `head` guesses; they share a cache."""

    prefix_bytes = 0

    def __init__(self, head: Head, context_length: int, vocab_size: int) -> None:
        self.context_length = context_length
        self.vocab_size = vocab_size
        self._head = head
        self._groups: Groups[HeadRow] = Groups(head, None)
        self._states = mx.zeros((0, 0))
        """The head's own, (rows, width), of the rows in `_order`."""
        self._order: list[int] = []

    @property
    def nbytes(self) -> int:
        return self._groups.nbytes

    def held(self, id_: int) -> int:
        """Tokens of a request in the cache."""
        return next((row.computed for row in self._groups.rows if row.id == id_), 0)

    def keep(self, ids: frozenset[int]) -> None:
        """Drop all other rows."""
        gone = frozenset(row.id for row in self._groups.rows) - ids
        if gone:
            self._settle()
            self._groups.remove(gone)

    def clear(self) -> None:
        """Forget all arrays."""
        self._groups = Groups(self._head, None)
        self._states, self._order = mx.zeros((0, 0)), []

    def resize(self, limit: int, beside: int) -> int:
        """As of `Drafts`; no prefixes are kept."""
        return 0

    def forget_prefixes(self) -> None: ...

    def catch_up(self, sequence: Sequence, budget: int) -> tuple[int, float]:
        """Read what is unread of a request, but for the last tokens; returns how many, and how many
        keys each attended to on average. `budget` bounds it where others share the cache.
        """
        row = next((row for row in self._groups.rows if row.id == sequence.id), None)
        if row is None:
            row = HeadRow(sequence)
            count = row.behind - 1
            cache = self._head.new_cache()
            if count > 0:
                tokens, states = row.read(count)
                kv.reserve(cache, count, count)
                mx.eval(self._head(mx.array([tokens]), states[None], cache))
            self._groups.add([row], self._head.caches.merge([cache]))
        else:
            self._settle()
            count = min(row.behind - 1, budget, MOST_BESIDE)
            if count > 0:
                mx.eval(self._feed({row.id: row.read(count)}))
        row.note()
        return max(count, 0), row.held - max(count, 0) / 2

    def guess(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        """Up to `most` tokens that the head draws next, by the ids of rows that have caught up."""
        self._settle()
        rows = [row for row in self._groups.rows if most.get(row.id) and 0 < row.behind <= NEARLY]
        if not rows:
            return {}
        logits = self._feed({row.id: row.read(NEARLY) for row in rows})
        for row in rows:
            row.note()
        return draw_ahead(rows, most, logits, self._step)

    def _settle(self) -> None:
        self._groups.roll_back({row.id: row.settle() for row in self._groups.rows})

    def _step(self, rows: Many[DraftRow], tokens: mx.array) -> mx.array:
        """Feed a token (rows,) to each row, after its own states."""
        ids = [row.id for row in rows]
        states = self._states
        if ids != self._order:
            states = states[mx.array([self._order.index(id_) for id_ in ids])]
        return self._compute(tokens, states, dict.fromkeys(ids, 1))

    def _feed(self, read: Read) -> mx.array:
        """Compute what rows read, in their order; logits as of `_compute`."""
        tokens = mx.array([token for tokens, _ in read.values() for token in tokens])
        states = mx.concatenate([states for _, states in read.values()])
        return self._compute(tokens, states, {id_: len(t) for id_, (t, _) in read.items()})

    def _compute(self, tokens: mx.array, states: mx.array, counts: Mapping[int, int]) -> mx.array:
        """Compute `tokens` (all,), before which there are `states` (all, width), of which rows have
        `counts` by their ids, in the rows' order; logits (rows with any, vocab) after their last.
        """
        outs, padding, start = [], {row.id: 0 for row in self._groups.rows}, 0
        for rows, cache in self._groups.members():
            mine = [counts.get(row.id, 0) for row in rows]
            width = max(mine)
            if not width:
                continue
            places = places_of(mine, width, start, tokens.size - 1)
            out = self._head(tokens[places], states[places], cache)
            lasts = [row * width + count - 1 for row, count in enumerate(mine) if count]
            outs.append(out.reshape(-1, out.shape[-1])[mx.array(lasts)])
            start += sum(mine)
            padding |= {row.id: width - count for row, count in zip(rows, mine, strict=True)}
        self._groups.roll_back(padding)
        self._states = mx.concatenate(outs)
        self._order = [row.id for row in self._groups.rows if counts.get(row.id)]
        return self._head.project(self._states).astype(mx.float32)
