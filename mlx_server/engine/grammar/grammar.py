"""What a grammar allows: a model's tokens, compiled grammars, a request's place in one, masks.

The work is llguidance's, which lets go of Python's lock in all that takes long. This module is for
the threads of `constraints`, which imports it when first asked to.

A mask is exact, token for token, so runs of forced text are not skipped: the tokens into which a
tokenizer would cut them are not always those that the model would have drawn.
"""

import json
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from mlx_server.engine.protocol import MOST_ROW_ITEMS, MOST_STEP_ITEMS

Words = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.intp]

WORD = 32
"""Tokens that have their bit in one word of a mask."""
LIMITS = LLParserLimits(
    verbose_errors=False, max_items_in_row=MOST_ROW_ITEMS, step_max_items=MOST_STEP_ITEMS
)
SILENT = 0


class GrammarError(ValueError):
    """A grammar, or a model, with which no constraint can be kept; the message says why."""


class Vocabulary:
    """The tokens of a model, as far as grammars are concerned."""

    def __init__(self, folder: Path, size: int) -> None:
        """`size` is the width of the model's logits. Raises GrammarError.

        Unlike all else here, this holds Python's lock throughout: 0.3 s for 50,000 tokens.
        """
        self.size = size
        self.ends = [token for token in _own_ends(folder) if token < size]
        """Tokens with which the model ends by itself."""
        try:
            content = (folder / "tokenizer.json").read_text(encoding="utf-8")
            self.tokens = _tokens(content, size, self.ends[:1])
        except FileNotFoundError as error:
            raise GrammarError("a constraint needs the model's tokenizer.json") from error
        except (OSError, ValueError) as error:
            raise GrammarError(f"the model's tokenizer.json cannot be used: {error}") from error
        self.width = -(-self.tokens.vocab_size // WORD)
        """Words of a mask."""
        self.known = _words(np.arange(self.width * WORD) < size)
        """A mask (width,) of the tokens that the model can give."""

    def words(self, tokens: Iterable[int]) -> Words:
        """A mask (width,) with the bits of `tokens`, of which the model may lack some."""
        bits = np.zeros(self.width * WORD, dtype=np.bool_)
        bits[[token for token in tokens if token < self.size]] = True
        return _words(bits)

    def has_text(self, token: int) -> bool:
        """Whether `token` may be drawn for its text; false for special tokens."""
        return token < self.size and not self.tokens.is_special_token(token)


def _words(bits: npt.NDArray[np.bool_]) -> Words:
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _tokens(content: str, size: int, ends: list[int]) -> LLTokenizer:
    """The tokens in `content`, of which a model may know more or fewer. Raises ValueError."""
    end = ends or None
    try:
        return LLTokenizer(content, n_vocab=size, eos_token=end)
    except ValueError:  # it has tokens that the model cannot give
        return LLTokenizer(content, eos_token=end)


def _own_ends(folder: Path) -> list[int]:
    """The end-of-sequence tokens that the model's configuration names."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for settings in (config, config.get("text_config") or {}):
            named = settings.get("eos_token_id")
            ends |= {named} if isinstance(named, int) else set(named or ())
    return sorted(ends)


class Grammar:
    """A compiled grammar, from which the constraints of requests begin."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        """Raises GrammarError when `text` cannot be compiled, or not within the limits."""
        self.vocabulary = vocabulary
        self._pristine = LLMatcher(vocabulary.tokens, text, log_level=SILENT, limits=LIMITS)
        # Some exceed a limit only here, and what this finds out the copies need not.
        self._pristine.compute_bitmask()
        if self._pristine.is_error():
            raise GrammarError(f"the grammar cannot be used: {self._pristine.get_error()}")

    def ends(self, stop_tokens: frozenset[int]) -> frozenset[int]:
        """What ends a completion: `stop_tokens`, or if there are none, the model's own.

        Raises GrammarError when there are none of either kind.
        """
        ends = stop_tokens or frozenset(self.vocabulary.ends)
        if not ends:
            raise GrammarError("the model names no token that could end a constrained completion")
        return ends

    def matcher(self) -> LLMatcher:
        """A matcher that has consumed nothing."""
        return self._pristine.deep_copy()


class Constraint:
    """How far one completion has come in its grammar.

    The loop tells it tokens as they are read back; a thread that computes masks has them consumed.
    """

    def __init__(
        self, grammar: Grammar, stop_tokens: frozenset[int], completion: list[int]
    ) -> None:
        """Begins after `completion`, and ends with one of `stop_tokens`."""
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        self._told = list(completion)
        vocabulary = grammar.vocabulary
        self.width = vocabulary.width
        self._stops = vocabulary.words(stop_tokens)
        # A stop token may have a text. It would end the completion wherever that text may stand.
        textual = [t for t in stop_tokens if vocabulary.has_text(t)]
        self._midway = vocabulary.known & ~vocabulary.words(textual)
        self._at_end = vocabulary.known & ~vocabulary.words([vocabulary.tokens.eos_token])

    def tell(self, token: int) -> None:
        """Take note of the completion's next token."""
        self._told.append(token)

    def told(self) -> list[int]:
        """Tokens told since this was last asked."""
        told, self._told = self._told, []
        return told

    @property
    def matcher(self) -> LLMatcher:
        """For the thread that computes masks alone: it copies and replays at first use."""
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        return self._matcher

    def problem(self, words: Words) -> str | None:
        """Why the completion cannot go on with the tokens of `words` (width,), if it cannot."""
        if self.matcher.is_error():
            return f"the constraint cannot be kept: {self.matcher.get_error()}"
        return None if words.any() else "the constraint leaves the model no token to go on with"

    def put_stops(self, words: Words) -> None:
        """Allow the stop tokens in a mask (width,) where the grammar may end, and there alone."""
        if self.matcher.is_accepting():
            words &= self._at_end
            words |= self._stops
        else:
            words &= self._midway


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the constrained rows of a step may take.

    `rows` are their places in the batch. `words` (rows, width) uint32 hold a bit for each token,
    the lowest in front. `forced` are the tokens, by place, of rows to which but one is left, and
    `problems` say, by place, why a row cannot go on; such rows are not among `rows`.
    """

    rows: list[int]
    words: Words
    forced: dict[int, int]
    problems: dict[int, str]

    def choices(self, vocab_size: int) -> dict[int, Ids]:
        """The tokens, in rising order, that each of the rows may take."""
        bits = np.unpackbits(
            self.words.view(np.uint8), axis=1, count=vocab_size, bitorder="little"
        ).view(np.bool_)
        return {row: np.flatnonzero(mine) for row, mine in zip(self.rows, bits, strict=True)}


class Masker:
    """Computes the masks of a whole step at once, on a few processors."""

    def __init__(self, threads: int) -> None:
        self._executor = LLExecutor(threads)

    def compute(self, told: Many[tuple[int, Constraint, list[int]]]) -> Allowed:
        """What rows, of which there is one at least, may take: place, constraint, new tokens."""
        self._consume([(constraint, tokens) for _, constraint, tokens in told])
        words = np.zeros((len(told), told[0][1].width), dtype=np.uint32)
        matchers = [(constraint.matcher, i) for i, (_, constraint, _) in enumerate(told)]
        self._executor.unsafe_compute_mask_ptr(
            matchers, words.ctypes.data, words.strides[0], len(told)
        )
        problems: dict[int, str] = {}
        for (place, constraint, _), mine in zip(told, words, strict=True):
            constraint.put_stops(mine)
            if problem := constraint.problem(mine):
                problems[place] = problem
        kept = [i for i, (place, _, _) in enumerate(told) if place not in problems]
        rows, words = [told[i][0] for i in kept], words[kept]
        return Allowed(rows, words, _forced(rows, words), problems)

    def _consume(self, told: list[tuple[Constraint, list[int]]]) -> None:
        """Advance matchers, all at once as far as they have one new token each."""
        one_each = [(c.matcher, tokens[0]) for c, tokens in told if len(tokens) == 1]
        if one_each:
            self._executor.consume_token_par(one_each)
        for constraint, tokens in told:
            if len(tokens) > 1:  # it goes on after tokens of an earlier run
                constraint.matcher.consume_tokens(tokens)


def _forced(rows: list[int], words: Words) -> dict[int, int]:
    """The token of each row whose `words` (rows, width) have a single bit."""
    forced: dict[int, int] = {}
    for i in np.flatnonzero(np.bitwise_count(words).sum(axis=1) == 1):
        at = int(words[i].argmax())
        forced[rows[i]] = at * WORD + int(words[i, at]).bit_length() - 1
    return forced
