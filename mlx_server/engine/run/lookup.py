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
FADING = 0.9
"""What earlier guesses of a request count after each further one."""
PRIOR = 2.0
"""How many guesses of its own what is known of other requests' counts as, for a request."""
LOOKED_UP, FORCED = 0.6, 0.75
"""How likely an engine's first guesses are taken to be right, by where they come from."""
LONG_MEMORY = 0.995
"""What an engine's earlier guesses count after each further one."""


class Guesser(Protocol):
    @property
    def ready(self) -> int:
        """How many tokens there are to guess."""

    @property
    def chances(self) -> tuple[float, float]:
        """How likely the first guessed token is right, and each further one after right ones."""

    def append(self, token: int) -> None:
        """The request got a token, whether it was guessed or not."""

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""

    def index(self, most: int) -> None:
        """Make up to `most` tokens more known, where some are not yet."""


class Rate:
    """How often guesses come true; earlier ones count ever less.

    `hope` is what to expect of the first: a share, or how it is for other requests.
    """

    def __init__(self, hope: "Rate | float") -> None:
        self._right = self._wrong = 0.0
        self._hope = hope
        self._fading = FADING if isinstance(hope, Rate) else LONG_MEMORY

    @property
    def chance(self) -> float:
        hope = self._hope.chance if isinstance(self._hope, Rate) else self._hope
        return (self._right + PRIOR * hope) / (self._right + self._wrong + PRIOR)

    def observe(self, *, right: bool) -> None:
        self._right = self._fading * self._right + right
        self._wrong = self._fading * self._wrong + (not right)
        if isinstance(self._hope, Rate):
            self._hope.observe(right=right)


class Experience:
    """What an engine has seen of its requests' guesses: of a place found anew, of one that has been
    right before, and of text that a grammar forces.
    """

    def __init__(self) -> None:
        self.found, self.followed = Rate(LOOKED_UP), Rate(LOOKED_UP)
        self.forced = Rate(FORCED)


class Lookup:
    """One request's tokens, and where each of its n-grams was last followed by another token.

    `prediction` is what the completion is likely to begin with. What would have been guessed is
    compared with each token that comes, so that nothing need be guessed to learn whether it pays.
    """

    def __init__(
        self,
        experience: Experience,
        prompt: Many[int],
        prediction: Many[int] = (),
        completion: Many[int] = (),
    ) -> None:
        self._tokens = [*prediction, *prompt]
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = max(NGRAM, len(self._tokens) - LONGEST)
        self._source: int | None = 0 if prediction else None
        self._found, self._followed = Rate(experience.found), Rate(experience.followed)
        self._right = False
        """Whether the place has been right before."""
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
        return 0 if self._source is None else min(MOST, len(self._tokens) - self._source)

    @property
    def chances(self) -> tuple[float, float]:
        then = self._followed.chance
        return then if self._right else self._found.chance, then

    def append(self, token: int) -> None:
        tokens, source = self._tokens, self._source
        right = source is not None and tokens[source] == token
        if source is not None:
            (self._followed if self._right else self._found).observe(right=right)
        tokens.append(token)
        self.index(2)
        self._right = right
        if right and source is not None:
            self._source = source + 1
        else:
            self._source = self._after.get(tuple(tokens[-NGRAM:]))

    def guess(self, most: int) -> list[int]:
        if self._source is None:
            return []
        return self._tokens[self._source : self._source + min(most, self.ready)]


class Forced:
    """Guesses the tokens of a text that a grammar forces, which the model may cut in other ways,
    and elsewhere what `lookup` does.
    """

    def __init__(self, experience: Experience, lookup: Lookup) -> None:
        self._lookup = lookup
        self._run: list[int] = []
        self._rate = Rate(experience.forced)

    @property
    def ready(self) -> int:
        return min(MOST, len(self._run)) or self._lookup.ready

    @property
    def chances(self) -> tuple[float, float]:
        return (self._rate.chance, self._rate.chance) if self._run else self._lookup.chances

    def begin(self, run: list[int]) -> None:
        """`run` may come from the next token on."""
        self._run = run

    def append(self, token: int) -> None:
        self._lookup.append(token)
        if not self._run:
            return
        right = self._run[0] == token
        self._rate.observe(right=right)
        self._run = self._run[1:] if right else []

    def guess(self, most: int) -> list[int]:
        return self._run[: min(most, MOST)] or self._lookup.guess(most)

    def index(self, most: int) -> None:
        self._lookup.index(most)
