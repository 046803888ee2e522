"""Guesses of the tokens to come, of which `schedule` decides how many are made.

Prompt lookup decoding (Saxena 2023): what followed the last few tokens when they came before in the
request's own prompt and answer. And text that a grammar forces.
"""

from collections.abc import Sequence as Many
from typing import Protocol

NGRAM = 4
"""Tokens that must have come before."""
LONGEST = 65_536
"""Tokens of prompt and prediction, the last ones, in which guesses are looked up."""
MOST = 8
"""Tokens guessed at a time, at most."""
RIGHT, WRONG = 1.5, 0.5
"""Guesses that a request is taken to have seen come true and fail before its first."""
FADING, RECOVERING = 0.9, 0.99
"""What earlier guesses count after each further one, and after each token without one."""
FIRST_PAUSE, LONGEST_PAUSE = 4, 512
"""Tokens without guesses after one that was wrong at once; doubled each time."""


class Guesser(Protocol):
    @property
    def ready(self) -> int:
        """How many tokens there are to guess."""

    @property
    def chance(self) -> float:
        """How likely a guessed token is right where those before it are."""

    def append(self, token: int) -> None:
        """The request got a token."""

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""

    def judge(self, guessed: int, accepted: int) -> None:
        """Learn from what came of a guess."""


class Trust:
    """How often a request's guesses came true."""

    def __init__(self) -> None:
        self._right = self._wrong = 0.0

    @property
    def chance(self) -> float:
        right, wrong = self._right + RIGHT, self._wrong + WRONG
        return right / (right + wrong)

    def append(self) -> None:
        self._right *= RECOVERING
        self._wrong *= RECOVERING

    def judge(self, guessed: int, accepted: int) -> None:
        self._right = FADING * self._right + accepted
        self._wrong = FADING * self._wrong + (accepted < guessed)


class Forced:
    """Guesses the tokens of a text that a grammar forces; the model may cut it in other ways."""

    def __init__(self) -> None:
        self._run: list[int] = []
        self._trust = Trust()

    @property
    def ready(self) -> int:
        return min(MOST, len(self._run))

    @property
    def chance(self) -> float:
        return self._trust.chance

    def begin(self, run: list[int]) -> None:
        """`run` may come from the next token on."""
        self._run = run

    def append(self, token: int) -> None:
        self._trust.append()
        self._run = self._run[1:] if self._run[:1] == [token] else []

    def guess(self, most: int) -> list[int]:
        return self._run[: min(most, MOST)]

    def judge(self, guessed: int, accepted: int) -> None:
        self._trust.judge(guessed, accepted)


class Lookup:
    """One request's tokens, and where each of its n-grams was last followed by another token.

    `prediction` is what the completion is likely to begin with.
    """

    def __init__(
        self, prompt: Many[int], prediction: Many[int] = (), completion: Many[int] = ()
    ) -> None:
        self._tokens = [*prediction, *prompt]
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = max(NGRAM, len(self._tokens) - LONGEST)
        self._source: int | None = 0 if prediction else None
        self._trust = Trust()
        self._pause = FIRST_PAUSE
        self._silent_until = 0
        for token in completion:
            self.append(token)

    def index(self, most: int) -> None:
        """Make up to `most` tokens more known, where some are not yet."""
        tokens, end = self._tokens, min(len(self._tokens), self._indexed + most)
        for place in range(self._indexed, end):
            self._after[tuple(tokens[place - NGRAM : place])] = place
        self._indexed = max(self._indexed, end)

    @property
    def ready(self) -> int:
        if self._source is None or len(self._tokens) < self._silent_until:
            return 0
        return min(MOST, len(self._tokens) - self._source)

    @property
    def chance(self) -> float:
        return self._trust.chance

    def append(self, token: int) -> None:
        tokens, source = self._tokens, self._source
        goes_on = source is not None and source < len(tokens) and tokens[source] == token
        tokens.append(token)
        self.index(2)
        self._trust.append()
        if goes_on and source is not None:
            self._source = source + 1
        else:
            self._source = self._after.get(tuple(tokens[-NGRAM:]))

    def guess(self, most: int) -> list[int]:
        if self._source is None:
            return []
        return self._tokens[self._source : self._source + min(most, self.ready)]

    def judge(self, guessed: int, accepted: int) -> None:
        self._trust.judge(guessed, accepted)
        if accepted:
            self._pause = FIRST_PAUSE
        else:
            self._silent_until = len(self._tokens) + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
