"""Grammars and masks by llguidance, which `compiler` and `masks` import in their threads.

Runs of forced text are guesses and no more: the tokens into which a tokenizer would cut them are
not always those that the model draws.
"""

import json
import logging
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from mlx_server.dimensions import text_part
from mlx_server.engine.protocol import MOST_ROW_ITEMS, MOST_STEP_ITEMS
from mlx_server.tokenizer_json import NAME, for_grammars

Words = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.intp]

MOST_FORCED_STARTS = 32
"""A forced text may begin with the tokens of its first characters, and hardly with more."""
WORD = 32
"""Tokens per word of a mask, the lowest in the lowest bit."""
LIMITS = LLParserLimits(
    verbose_errors=False, max_items_in_row=MOST_ROW_ITEMS, step_max_items=MOST_STEP_ITEMS
)
SILENT = 0

log = logging.getLogger("mlx_server.engine")


class GrammarError(ValueError):
    """The grammar, or the model, cannot be used."""


class Vocabulary:
    """A model's tokens; a mask of them has `width` words, `known` is the mask of all."""

    def __init__(self, folder: Path, size: int, tokenizer: bytes | None = None) -> None:
        """`size` is the width of the model's logits, `tokenizer` replaces the folder's.

        Raises GrammarError. Holds Python's lock throughout: 0.3 s for 50,000 tokens.
        """
        self.size = size
        self.ends = [token for token in _own_ends(folder) if token < size]
        try:
            content = for_grammars(tokenizer or (folder / NAME).read_bytes())
            self.tokens = _tokens(content.decode(), size, self.ends[:1])
        except (OSError, ValueError) as error:
            raise GrammarError(f"the model's tokenizer cannot be used: {error}") from error
        self.width = -(-self.tokens.vocab_size // WORD)
        self.known = _words(np.arange(self.width * WORD) < size)

    def words(self, tokens: Iterable[int]) -> Words:
        """The mask (width,) of those of `tokens` that the model has."""
        bits = np.zeros(self.width * WORD, dtype=np.bool_)
        bits[[token for token in tokens if token < self.size]] = True
        return _words(bits)

    def has_text(self, token: int) -> bool:
        """False for special tokens."""
        return token < self.size and not self.tokens.is_special_token(token)


def _words(bits: npt.NDArray[np.bool_]) -> Words:
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _tokens(content: str, size: int, ends: list[int]) -> LLTokenizer:
    """Raises ValueError."""
    end = ends or None
    try:
        return LLTokenizer(content, n_vocab=size, eos_token=end)
    except ValueError:  # it has tokens that the model cannot give
        return LLTokenizer(content, eos_token=end)


def _own_ends(folder: Path) -> list[int]:
    """Of both configs; a broken one names none."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            config = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        parts = (config, text_part(config)) if isinstance(config, dict) else ()
        for settings in parts:
            named = settings.get("eos_token_id")
            ends |= {
                one for one in (named if isinstance(named, list) else [named]) if type(one) is int
            }
    return sorted(ends)


class Grammar:
    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        """Raises GrammarError when `text` exceeds the limits or cannot be compiled."""
        self.vocabulary = vocabulary
        self._pristine = LLMatcher(vocabulary.tokens, text, log_level=SILENT, limits=LIMITS)
        # Some exceed a limit only here; copies share what this computes.
        self._pristine.compute_bitmask()
        if self._pristine.is_error():
            raise GrammarError(f"the grammar cannot be used: {self._pristine.get_error()}")

    def ends(self, stop_tokens: frozenset[int]) -> frozenset[int]:
        """`stop_tokens`, or without any, the model's own. Raises GrammarError if it has none."""
        ends = stop_tokens or frozenset(self.vocabulary.ends)
        if not ends:
            raise GrammarError("the model names no token that could end a constrained completion")
        return ends

    def matcher(self) -> LLMatcher:
        return self._pristine.deep_copy()


class Constraint:
    """One completion's place in its grammar.

    The loop appends tokens as they are read back; the mask thread has the matcher consume them.
    """

    def __init__(
        self, grammar: Grammar, stop_tokens: frozenset[int], completion: list[int]
    ) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        self._completion = list(completion)
        self._consumed = 0
        vocabulary = grammar.vocabulary
        self.width = vocabulary.width
        self._stops = vocabulary.words(stop_tokens)
        # Where the grammar allows a stop token's text, the token would end the completion early.
        textual = [t for t in stop_tokens if vocabulary.has_text(t)]
        self._midway = vocabulary.known & ~vocabulary.words(textual)
        self._at_end = vocabulary.known & ~vocabulary.words([vocabulary.tokens.eos_token])

    def append(self, token: int) -> None:
        self._completion.append(token)

    def take_new(self) -> list[int]:
        new = self._completion[self._consumed :]
        self._consumed += len(new)
        return new

    @property
    def matcher(self) -> LLMatcher:
        """For the mask thread alone: the first use copies the grammar's."""
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        return self._matcher

    def restart(self) -> list[int]:
        """For the mask thread alone: begin anew; returns the tokens to consume."""
        self._matcher = None
        return self._completion[: self._consumed]

    def problem(self, words: Words, matcher: LLMatcher) -> str | None:
        if matcher.is_error():
            return f"the constraint cannot be kept: {matcher.get_error()}"
        return None if words.any() else "the constraint leaves the model no token to go on with"

    def complete(self, words: Words, guess: Many[int]) -> dict[int, str]:
        """For the mask thread alone: given the matcher's mask in the first of `words` (1 + guesses,
        width), fill in the rest, as if each guess had come; returns what is wrong, by row.

        Where a guess may not come, it does not matter what follows it.
        """
        problems = {}
        consumed = 0
        # A copy, since some grammars cannot be rolled back.
        matcher = self.matcher.deep_copy() if guess else self.matcher
        for i, mine in enumerate(words):
            if i > consumed:
                mine[:] = self._midway
                continue
            if i:
                matcher.unsafe_compute_mask_ptr(mine.ctypes.data, mine.nbytes)
            self.put_stops(mine, matcher)
            if problem := self.problem(mine, matcher):
                problems[i] = problem
            elif i < len(guess):
                consumed += matcher.try_consume_tokens([guess[i]])
        return problems

    def run(self, words: Words) -> list[int]:
        """For the mask thread alone: tokens of a text that is forced, given the mask (width,)."""
        if int(np.bitwise_count(words).sum()) > MOST_FORCED_STARTS:
            return []
        run: list[int] = self.matcher.compute_ff_tokens()
        if not run and (forced := self.matcher.compute_ff_bytes()):  # by tokenizers that cut freely
            run = self._grammar.vocabulary.tokens.tokenize_bytes(forced)
        return run

    def put_stops(self, words: Words, matcher: LLMatcher) -> None:
        """Allow stop tokens in `words` (width,) only where the grammar may end."""
        if matcher.is_accepting():
            words &= self._at_end
            words |= self._stops
        else:
            words &= self._midway


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the constrained rows of a step may take.

    `rows` are their places in the batch, `words` (rows, width) uint32 their masks; `forced` has
    the only token of a place, `problems` why a place, not in `rows`, cannot go on. `runs` are
    tokens that are likely to come from a place on, since their text is forced.
    """

    rows: list[int]
    words: Words
    forced: dict[int, int]
    problems: dict[int, str]
    runs: dict[int, list[int]] = field(default_factory=dict)

    def choices(self, vocab_size: int) -> dict[int, Ids]:
        """In rising order."""
        bits = np.unpackbits(
            self.words.view(np.uint8), axis=1, count=vocab_size, bitorder="little"
        ).view(np.bool_)
        return {row: np.flatnonzero(mine) for row, mine in zip(self.rows, bits, strict=True)}


class Asked(NamedTuple):
    """A row's place, its constraint, its tokens since the last mask, and guesses of the next ones,
    whose places follow its own.
    """

    place: int
    constraint: Constraint
    tokens: list[int]
    guess: Many[int] = ()


class Masker:
    def __init__(self, threads: int) -> None:
        self._executor = LLExecutor(threads)

    def compute(self, new: Many[Asked]) -> Allowed:
        """Needs at least one row."""
        try:
            return self._together(new)
        except BaseException:  # a panic in Rust is no Exception
            log.exception("event=masks_failed rows=%d", len(new))
        return _merged([self._alone(one) for one in new])

    def _alone(self, one: Asked) -> Allowed:
        constraint = one.constraint
        try:
            return self._together([one._replace(tokens=constraint.restart())])
        except BaseException as error:
            log.exception("event=mask_failed")
            words = np.zeros((0, constraint.width), dtype=np.uint32)
            return Allowed([], words, {}, {one.place: f"the constraint cannot be kept: {error}"})

    def _together(self, new: Many[Asked]) -> Allowed:
        self._consume([(one.constraint, one.tokens) for one in new])
        places = [one.place + i for one in new for i in range(1 + len(one.guess))]
        words = np.zeros((len(places), new[0].constraint.width), dtype=np.uint32)
        at = dict(zip(places, range(len(places)), strict=True))
        matchers = [(one.constraint.matcher, at[one.place]) for one in new]
        self._executor.unsafe_compute_mask_ptr(
            matchers, words.ctypes.data, words.strides[0], len(places)
        )
        problems: dict[int, str] = {}
        runs: dict[int, list[int]] = {}
        for one in new:
            start = at[one.place]
            mine = words[start : start + 1 + len(one.guess)]
            for i, problem in one.constraint.complete(mine, one.guess).items():
                problems[one.place + i] = problem
            if run := one.constraint.run(mine[0]):
                runs[one.place] = run
        kept = [place for place in places if place not in problems]
        words = words[[at[place] for place in kept]]
        return Allowed(kept, words, _forced(kept, words), problems, runs)

    def _consume(self, new: list[tuple[Constraint, list[int]]]) -> None:
        one_each = [(c.matcher, tokens[0]) for c, tokens in new if len(tokens) == 1]
        if one_each:
            self._executor.consume_token_par(one_each)
        for constraint, tokens in new:
            if len(tokens) > 1:  # it resumes after tokens of an earlier engine or place
                constraint.matcher.consume_tokens(tokens)


def _merged(parts: list[Allowed]) -> Allowed:
    return Allowed(
        [row for part in parts for row in part.rows],
        np.concatenate([part.words for part in parts]),
        {row: token for part in parts for row, token in part.forced.items()},
        {row: problem for part in parts for row, problem in part.problems.items()},
        {row: run for part in parts for row, run in part.runs.items()},
    )


def _forced(rows: list[int], words: Words) -> dict[int, int]:
    forced: dict[int, int] = {}
    for i in np.flatnonzero(np.bitwise_count(words).sum(axis=1) == 1):
        at = int(words[i].argmax())
        forced[rows[i]] = at * WORD + int(words[i, at]).bit_length() - 1
    return forced
