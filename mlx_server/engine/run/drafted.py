"""When a draft model guesses for a request; what it guesses is computed in `drafts`."""

from mlx_server.engine.run.lookup import MOST, Forced, Guesser, Lookup

RIGHT, WRONG = 1.5, 0.5
"""Guesses that the draft is taken to have seen come true and fail before its first."""
OWN_RIGHT, OWN_WRONG = 6.0, 2.0
"""The same of a model's own head, which has been made for it."""
FADING, RECOVERING = 0.9, 0.99
"""What its earlier guesses count after each further one, and after each token without one."""
FIRST_PAUSE, LONGEST_PAUSE = 4, 512
"""Tokens without its guesses after failures; doubled each time."""
NEARLY = MOST + 1
"""Tokens that the draft's cache may lack when it guesses: those of a pass before."""
FAILURES = 4
"""Guesses in a row that were wrong at once, from which on the draft pauses after each."""
AS_GOOD = 0.8
"""How likely a guess that costs nothing must be right beside the draft's, to be made instead."""


def own_guesser(guesser: Guesser | None) -> Guesser | None:
    """What guesses from the request's own tokens or grammar."""
    return guesser.own if isinstance(guesser, Drafted) else guesser


class Trust:
    """How often the draft's guesses for a request came true, `right` and `wrong` ones before it."""

    def __init__(self, right: float = RIGHT, wrong: float = WRONG) -> None:
        self._right = self._wrong = 0.0
        self._before = (right, wrong)

    @property
    def chance(self) -> float:
        right, wrong = self._right + self._before[0], self._wrong + self._before[1]
        return right / (right + wrong)

    def append(self) -> None:
        self._right *= RECOVERING
        self._wrong *= RECOVERING

    def judge(self, guessed: int, accepted: int) -> None:
        self._right = FADING * self._right + accepted
        self._wrong = FADING * self._wrong + (accepted < guessed)


class Drafted:
    """Guesses what a draft model or the model's head draws, where `own` has nothing as good.

    The draft's cache lacks `behind` tokens of the request, at most, and at first it has none.
    `longest` is how many it may have, and its tokens are below `vocabulary`.
    """

    def __init__(
        self,
        own: Lookup | Forced,
        tokens: list[int],
        longest: int,
        vocabulary: int,
        trust: Trust | None = None,
    ) -> None:
        self.own = own
        self.behind = max(len(tokens), NEARLY + 1)
        self._length = len(tokens)
        self._longest = longest - MOST
        self._vocabulary = vocabulary
        self._known = max(tokens) < vocabulary
        self._trust = trust or Trust()
        self._failures = 0
        self._silent_until = 0
        self._pause = FIRST_PAUSE
        self._made_by_draft = False

    @property
    def wanted(self) -> bool:
        """Whether the draft should guess next, once its cache is ready."""
        if not self._known or not self._silent_until <= self._length < self._longest:
            return False
        return not self.own.ready or self.own.chances[0] < AS_GOOD * self._trust.chance

    @property
    def drafts(self) -> bool:
        """Whether the draft makes the next guess."""
        return self.behind <= NEARLY and self.wanted

    @property
    def ready(self) -> int:
        return MOST if self.drafts else self.own.ready

    @property
    def chances(self) -> tuple[float, float]:
        return self.draft_chances if self.drafts else self.own.chances

    @property
    def draft_chances(self) -> tuple[float, float]:
        """How likely the draft's next token is right, and each further one."""
        return self._trust.chance, self._trust.chance

    def append(self, token: int) -> None:
        self.own.append(token)
        self.behind += 1
        self._length += 1
        self._known = self._known and token < self._vocabulary
        self._trust.append()

    def guess(self, most: int) -> list[int]:
        """None where the draft makes it."""
        self._made_by_draft = self.drafts
        return [] if self._made_by_draft else self.own.guess(most)

    def index(self, most: int) -> None:
        self.own.index(most)

    def judge(self, guessed: int, accepted: int) -> None:
        """Learn from what came of a guess."""
        if not self._made_by_draft:
            return
        self._trust.judge(guessed, accepted)
        if accepted:
            self._failures, self._pause = 0, FIRST_PAUSE
            return
        self._failures += 1
        if self._failures >= FAILURES:
            self._silent_until = self._length + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
