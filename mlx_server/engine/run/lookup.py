"""Guesses of the tokens to come, looked up in a request's own prompt and answer.

Prompt lookup decoding (Saxena 2023): what followed the last few tokens when they came before. How
many are guessed, and when, follows from the request's own tokens alone.
"""

from collections.abc import Sequence as Many

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
        self._right = self._wrong = 0.0
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
        """How many tokens there are to guess."""
        if self._source is None or len(self._tokens) < self._silent_until:
            return 0
        return min(MOST, len(self._tokens) - self._source)

    @property
    def chance(self) -> float:
        """How likely a guessed token is right where those before it are."""
        right, wrong = self._right + RIGHT, self._wrong + WRONG
        return right / (right + wrong)

    def append(self, token: int) -> None:
        tokens, source = self._tokens, self._source
        goes_on = source is not None and source < len(tokens) and tokens[source] == token
        tokens.append(token)
        self.index(2)
        self._right *= RECOVERING
        self._wrong *= RECOVERING
        if goes_on and source is not None:
            self._source = source + 1
        else:
            self._source = self._after.get(tuple(tokens[-NGRAM:]))

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""
        if self._source is None:
            return []
        return self._tokens[self._source : self._source + min(most, self.ready)]

    def judge(self, guessed: int, accepted: int) -> None:
        """Learn from what came of a guess."""
        self._right = FADING * self._right + accepted
        self._wrong = FADING * self._wrong + (accepted < guessed)
        if accepted:
            self._pause = FIRST_PAUSE
        else:
            self._silent_until = len(self._tokens) + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
