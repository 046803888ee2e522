"""The decoding batch: one row a request, one token a row and step."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_server.engine.grammar.masks import Masks, MaskThread
from mlx_server.engine.protocol import Failed, Logprobs, Row
from mlx_server.engine.ranks.sharing import Sampler
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.drafted import Drafted, own_guesser
from mlx_server.engine.run.groups import Groups, ids_of
from mlx_server.engine.run.lookup import Forced
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.prefill import Prefill
from mlx_server.engine.run.store import logprob_entries
from mlx_server.engine.run.verify import Guesses, Verification, Verified, last_token
from mlx_server.engine.sampling.sampler import Draw
from mlx_server.engine.sequence import Sequence


@dataclass
class Step:
    """A launched decode step whose tokens have not been read back."""

    rows: list[Sequence]
    draw: Draw
    masks: Masks | None = None
    states: mx.array | None = None
    """The model's last hidden states (rows, 1, width), for its head."""

    def begin_masks(self) -> None:
        """Compute masks for the constrained rows, all tokens before this step being known."""
        if self.masks is not None:
            rows = enumerate(self.rows)
            self.masks.begin({i: r.constraint for i, r in rows if r.constraint and not r.done})

    def finish(self) -> list[Failed]:
        """Make the tokens valid; returns the requests that cannot go on."""
        self.draw.finish()
        allowed = self.masks.wait() if self.masks is not None else None
        for place, run in allowed.runs.items() if allowed is not None else ():
            guesser = own_guesser(self.rows[place].guesser)
            if isinstance(guesser, Forced):
                guesser.begin(run)
        failed = []
        for place, problem in allowed.problems.items() if allowed is not None else ():
            sequence = self.rows[place]
            if not sequence.done:
                sequence.done = True
                failed.append(Failed(sequence.id, problem))
        return failed

    def read(self) -> list[Row]:
        tokens = cast(list[int], self.draw.tokens.tolist())
        entries = self._entries(tokens)
        told = []
        for place, (sequence, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if sequence.done:
                continue
            if self.states is not None and sequence.unread is not None:
                sequence.unread.add(sequence.known - 1, self.states[place])
            told.append(sequence.accept([token], [entries.get(sequence.id)]))
        return told

    def _entries(self, tokens: list[int]) -> dict[int, Logprobs]:
        logprobs = self.draw.logprobs()
        if logprobs is None:
            return {}
        asked = [i for i, row in enumerate(self.rows) if row.request.logprobs is not None]
        entries = logprob_entries([tokens[i] for i in asked], logprobs)
        return {
            self.rows[i].id: Logprobs(e.token, e.logprob, e.top[: self.rows[i].request.logprobs])
            for i, e in zip(asked, entries, strict=True)
        }


class Inputs:
    """The tokens (rows,) that the next step feeds to the model, perhaps still to be drawn."""

    def __init__(self) -> None:
        self._tokens = mx.array([], dtype=mx.uint32)
        self._draw: Draw | None = None

    @property
    def tokens(self) -> mx.array:
        if self._draw is not None:
            self._tokens, self._draw = self._draw.tokens, None
        return self._tokens

    def follow(self, draw: Draw) -> None:
        self._draw = draw

    def insert(self, place: int, new: list[int]) -> None:
        tokens = self.tokens
        middle = mx.array(new, dtype=mx.uint32)
        self._tokens = mx.concatenate([tokens[:place], middle, tokens[place:]])

    def keep(self, places: list[int]) -> None:
        kept = self.tokens[mx.array(places)] if places else mx.array([], dtype=mx.uint32)
        self._tokens, self._draw = kept, None


class Batch:
    """The steps of the decoding batch.

    Step n+1 is built before the host draws the tokens of step n and started before they are read,
    so that host and device work side by side. Masks are computed meanwhile.
    """

    def __init__(self, model: Backend, groups: Groups[Sequence], mask_thread: MaskThread) -> None:
        self.pending: Step | None = None
        self.failed: list[Failed] = []
        self._beside: mx.array | None = None
        self._model = model
        self._groups = groups
        self._mask_thread = mask_thread
        self.inputs = Inputs()
        self._sampler: Sampler | None = None

    @property
    def rows(self) -> list[Sequence]:
        return self._groups.rows

    @property
    def busy(self) -> bool:
        return bool(self.rows) or self.pending is not None

    @property
    def nbytes(self) -> int:
        return self._groups.nbytes

    @property
    def owes(self) -> bool:
        """Whether a row has tokens to be computed again, which a step cannot do."""
        return any(row.replay for row in self.rows if not row.done)

    def join(self, prefill: Prefill) -> None:
        new = prefill.sequences
        place = self._groups.add(new, prefill.batch_cache())
        self.inputs.insert(place, [sequence.request.prompt[-1] for sequence in new])
        self._sampler = None

    def leave(self, gone: Iterable[Sequence]) -> None:
        before = len(self.rows)
        keep = self._groups.remove(ids_of(list(gone)))
        if len(keep) < before:
            self.inputs.keep(keep)
            self._sampler = None

    def drop_ended(self) -> None:
        self.leave([row for row in self.rows if row.done or not row.decodes])

    def step(self, *chunk: Part) -> list[Row]:
        """Start the next step, with `chunk` in the same pass, and read the one before it.

        There must be rows for a chunk to go with. A step that is computed while it is built is read
        at once.
        """
        previous = self.pending  # until it is read, so that a failure loses none of its rows
        self.drop_ended()
        at_once = len(self.rows) <= self._model.eager_rows
        if previous and at_once:
            return self.settle()
        following = self._build(*chunk) if self.rows else None
        if previous:
            self.failed += previous.finish()
        if following:
            following.draw.start()
            mx.async_eval(self._groups.loose_ends())  # type: ignore[no-untyped-call]
        rows = previous.read() if previous else []
        self.pending = following
        if following:
            following.begin_masks()
        return self.settle() if at_once else rows

    def settle(self) -> list[Row]:
        """Read the step under way, start no other. Rows that have ended stay, since dropping them
        may fail, and what was read must be told first.
        """
        if self.pending:
            self.failed += self.pending.finish()
        rows = self.pending.read() if self.pending else []
        self.pending = None
        for row in self.rows:
            row.in_flight = False
        return rows

    def guesses(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        """What may come next in rows, up to `most` tokens by their ids; all steps must be read."""
        found = {}
        for row, room in self._with_room(most):
            if row.guesser is not None:
                found[row.id] = row.guesser.guess(room)
        return {id_: guess for id_, guess in found.items() if guess}

    def room_for_drafts(self, most: Mapping[int, int]) -> dict[int, int]:
        """Up to how many tokens, of `most`, a draft model is to guess, by the ids of rows."""
        return {
            row.id: room
            for row, room in self._with_room(most)
            if isinstance(row.guesser, Drafted) and row.guesser.drafts
        }

    def _with_room(self, most: Mapping[int, int]) -> Iterator[tuple[Sequence, int]]:
        for row in self.rows:
            room = min(most.get(row.id, 0), row.limit - len(row.completion) - 1)
            if room > 0:
                yield row, room

    def verify(self, guesses: Guesses, *chunk: Part) -> Verified:
        """Draw the next tokens of all rows, more than one where a guess is right; reads them."""
        thread = self._mask_thread
        verification = Verification(self._model, self._groups, guesses, thread, chunk)
        self._beside = verification.beside
        verified = verification.finish()
        self.failed += verified.failed
        self.inputs = Inputs()
        self.inputs.insert(0, [last_token(row) for row in self.rows])
        self._sampler = None
        return verified

    def take_beside(self) -> mx.array | None:
        """States (tokens, width) of the chunk in the last pass, if a head reads them."""
        beside, self._beside = self._beside, None
        return beside

    def take_failed(self) -> list[Failed]:
        failed, self.failed = self.failed, []
        return failed

    def _build(self, *chunk: Part) -> Step:
        """The graph of the next step; its inputs may still have to be drawn."""
        rows, inputs, ranks = self.rows, self.inputs.tokens, self._model.ranks
        if self._sampler is None:
            wanted = [row.request.logprobs for row in rows]
            bound = [i for i, row in enumerate(rows) if row.bound]
            self._sampler = ranks.sampler(rows, inputs, self._model.vocab_size, wanted, bound)
        masks = ranks.masks(self._mask_thread) if any(row.bound for row in rows) else None
        passed = self._model.step([*self._groups.parts(inputs), *chunk], len(rows))
        self._beside = passed.beside
        draw = self._sampler.launch(passed.logits[:, -1, :].astype(mx.float32), masks)
        for row in rows:
            row.launched += 1
            row.in_flight = True
        self.inputs.follow(draw)
        return Step(list(rows), draw, masks, passed.states)
