"""A request that an engine works on, and how far it is."""

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import msgspec

from mlx_server.engine.cache.prefix import usable_blocks
from mlx_server.engine.plan import Start
from mlx_server.engine.protocol import FinishReason, Generate, Logprobs, Row, Sampling

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Constraint, Grammar
    from mlx_server.engine.run.heads.unread import Unread
    from mlx_server.engine.run.lookup import Guesser

EXPECTED_TOKENS = 256
"""Completion tokens that admission makes room for; what gets longer may be preempted."""


def token_limit(request: Generate, context_length: int) -> int:
    """The most completion tokens of `request`, those generated before included."""
    room = context_length - len(request.prompt)
    return request.generated + min(request.max_tokens, room)


def expected_length(tokens: int, left: int) -> int:
    return tokens + min(EXPECTED_TOKENS, left)


def usable_keys(start: Start) -> list[bytes]:
    """Names of those blocks of a prompt that the prefix cache may answer for.

    A prompt to be scored is computed whole.
    """
    request = start.request
    if request.prompt_logprobs is not None:
        return []
    return start.keys[: usable_blocks(request.prompt)]


class Sequence:
    """One request from its prefill to its last token.

    `launched` counts the completion tokens sampled so far, read back or not; `keys` names the
    blocks of its tokens, and `cached` is how many tokens came from the prefix cache.
    """

    def __init__(self, start: Start, context_length: int) -> None:
        request = start.request
        self.request = request
        self.id = request.id
        self.sampling: Sampling = request.sampling
        split = len(request.prompt) - request.generated
        self.prompt = request.prompt[:split]
        self.completion = request.prompt[split:]
        self.launched = request.generated
        self.limit = token_limit(request, context_length)
        self.stop_tokens = frozenset(request.stop_tokens)
        # Nothing precedes the first token of a prompt, so it has no log-probability.
        self.prompt_logprobs: list[Logprobs | None] | None = (
            None if request.prompt_logprobs is None else [None]
        )
        self.keys = list(start.keys)
        self.usable_keys = usable_keys(start)
        self.cached = start.cached
        self.reported = start.reported
        self.constraint: Constraint | None = None
        self.guesser: Guesser | None = None
        self.unread: Unread | None = None
        """What the model's head is to read, if it has one."""
        self.replay: list[int] = []
        """Tokens, before the last, that were taken out of the caches and have to be computed again.
        """
        self.in_flight = False
        self.done = False

    @property
    def scored(self) -> bool:
        return self.request.prompt_logprobs is not None

    @property
    def bound(self) -> bool:
        """Whether a grammar binds it, which only the rank that draws need know."""
        return self.request.grammar is not None

    @property
    def decodes(self) -> bool:
        """Whether tokens are wanted, and not the prompt's scores alone."""
        return self.limit > self.launched

    @property
    def position(self) -> int:
        return self.launched

    @property
    def length(self) -> int:
        """Tokens known once what is launched has been read back."""
        return len(self.prompt) + self.launched

    @property
    def known(self) -> int:
        """Tokens read back, those of the prompt included."""
        return len(self.prompt) + len(self.completion)

    @property
    def computed(self) -> int:
        """Tokens in the batch's cache once what is launched has been computed."""
        return self.length - 1 - len(self.replay)

    @property
    def expected_length(self) -> int:
        return expected_length(self.length, self.limit - self.launched)

    def restart(self) -> Start:
        """The same request with nothing computed, to go on after the tokens read back so far."""
        self.done = True  # whatever is in flight is drawn again, and comes out the same
        request = msgspec.structs.replace(
            self.request,
            prompt=self.prompt + self.completion,
            generated=len(self.completion),
            max_tokens=self.limit - len(self.completion),
            prompt_logprobs=None if self.reported else self.request.prompt_logprobs,
        )
        return Start(request, self.keys, self.cached, self.reported)

    def constrain(self, grammar: "Grammar") -> None:
        """Bind what is to come to `grammar`. Raises GrammarError when nothing could end it."""
        from mlx_server.engine.grammar.grammar import Constraint  # loaded by now

        self.stop_tokens = grammar.ends(self.stop_tokens)
        self.constraint = Constraint(grammar, self.stop_tokens, self.completion)

    def accept(self, tokens: Many[int], logprobs: Many[Logprobs | None]) -> Row:
        """Record the next tokens read back, up to the last; returns the row that reports them."""
        taken: list[int] = []
        finish: FinishReason | None = None
        for token in tokens:
            taken.append(token)
            finish = self._accept(token)
            if finish is not None:
                break
        self.launched = max(self.launched, len(self.completion))
        self.done = finish is not None
        entries = [entry for entry in logprobs[: len(taken)] if entry is not None]
        return self.report(taken, finish, entries or None)

    def _accept(self, token: int) -> FinishReason | None:
        self.completion.append(token)
        if token in self.stop_tokens:
            return "stop"
        if len(self.completion) >= self.limit:
            return "length"
        if self.constraint is not None:
            self.constraint.append(token)
        if self.guesser is not None:
            self.guesser.append(token)
        return None

    def report(
        self,
        tokens: list[int],
        finish: FinishReason | None,
        logprobs: list[Logprobs] | None = None,
    ) -> Row:
        """A row for the front; the first one carries what is known of the prompt."""
        first, self.reported = not self.reported, True
        return Row(
            id=self.id,
            tokens=tokens,
            finish=finish,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if first else None,
            cached=self.cached if first else None,
        )
