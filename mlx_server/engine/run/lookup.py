"""Guesses of the tokens to come, looked up in a request's own prompt and answer.

Prompt lookup decoding (Saxena 2023): what followed the last few tokens when they came before. How
many are guessed, and when, follows from the request's own tokens alone.
"""

from collections.abc import Sequence as Many

NGRAM = 4
"""Tokens that must have come before."""
FIRST, MOST = 4, 8
"""Tokens guessed at first, and at most."""
PRICE = 0.35
"""What a guessed token costs, as a share of a decode step; what is accepted gains one."""
MOST_CREDIT = 4.0
FIRST_PAUSE, LONGEST_PAUSE = 16, 512
"""Tokens without guesses after those that did not pay; doubled each time."""


class Lookup:
    """One request's tokens, and where each of its n-grams was last followed by another token."""

    def __init__(self, tokens: Many[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._source: int | None = None
        self._most = FIRST
        self._credit = 0.0
        self._pause = FIRST_PAUSE
        self._silent_until = 0
        for token in tokens:
            self.append(token)

    @property
    def ready(self) -> bool:
        """Whether there is something to guess."""
        return self._source is not None and len(self._tokens) >= self._silent_until

    def append(self, token: int) -> None:
        tokens, source = self._tokens, self._source
        if len(tokens) >= NGRAM:
            self._after[tuple(tokens[-NGRAM:])] = len(tokens)
        goes_on = source is not None and source < len(tokens) and tokens[source] == token
        tokens.append(token)
        if goes_on and source is not None:
            self._source = source + 1
        else:
            self._source = self._after.get(tuple(tokens[-NGRAM:]))

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""
        if not self.ready or self._source is None:
            return []
        return self._tokens[self._source : self._source + min(most, self._most)]

    def judge(self, guessed: int, accepted: int) -> None:
        """Learn from what came of a guess."""
        gain = accepted - PRICE * (1 + guessed)
        self._credit = min(MOST_CREDIT, self._credit + gain)
        self._most = min(MOST, 2 * guessed) if accepted == guessed else max(2, accepted + 1)
        if accepted == guessed:
            self._pause = FIRST_PAUSE
        if self._credit < 0:
            self._credit = 0.0
            self._silent_until = len(self._tokens) + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
