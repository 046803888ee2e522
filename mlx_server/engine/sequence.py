"""One request in an engine, and how far it is."""

import copy
from concurrent.futures import Future
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import msgspec

from mlx_server.engine.cache.disk import BlockRead
from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.cache.prefix import (
    BLOCK,
    Block,
    PrefixCache,
    extend_keys,
    usable_blocks,
)
from mlx_server.engine.protocol import FinishReason, Generate, Logprobs, Row, Sampling

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Constraint, Grammar

EXPECTED_TOKENS = 256
"""Completion tokens that admission makes room for; what gets longer may be preempted."""


class Sequence:
    """One request and how far it is.

    `launched` counts the completion tokens sampled so far, read back or not. `keys` names the
    blocks of its tokens in the prefix cache, and `cached` is how many tokens came from there.
    `usable_keys` names those that a cache may answer for. While it waits, `held` are the cached
    blocks it is to use, and `read` those on their way from the disk; `grammar` is being compiled,
    and `constraint` is None until it is, or where there is none.
    """

    def __init__(self, request: Generate, context_length: int) -> None:
        self.request = request
        self.id = request.id
        self.sampling: Sampling = request.sampling
        split = len(request.prompt) - request.generated
        self.prompt = request.prompt[:split]
        self.completion = request.prompt[split:]
        self.launched = request.generated
        room = context_length - len(request.prompt)
        self.limit = request.generated + min(request.max_tokens, room)
        self.stop_tokens = frozenset(request.stop_tokens)
        # Nothing precedes the first token of a prompt, so it has no log-probability.
        self.prompt_logprobs: list[Logprobs | None] | None = (
            None if request.prompt_logprobs is None else [None]
        )
        self.keys: list[bytes] = []
        extend_keys(self.keys, request.prompt)
        self.usable_keys = self._usable_keys()
        self.cached: int | None = None
        self.held: list[Block] = []
        self.read: BlockRead | None = None
        self.grammar: Future[Grammar] | None = None
        self.constraint: Constraint | None = None
        self.fetched = False
        self.in_flight = False
        self.suspect = False
        """Whether it was there when a turn failed, and has got nowhere since."""
        self.reported = False
        self.done = False

    def _usable_keys(self) -> list[bytes]:
        """The names of those blocks of the prompt that a cache may answer for."""
        return [] if self.scored else self.keys[: usable_blocks(self.request.prompt)]

    @property
    def scored(self) -> bool:
        """Whether its prompt's own log-probabilities are wanted, so that all of it is computed."""
        return self.request.prompt_logprobs is not None

    @property
    def bound(self) -> bool:
        """Whether the constraint that it asks for, if any, is there."""
        return self.request.grammar is None or self.constraint is not None

    @property
    def position(self) -> int:
        return self.launched

    @property
    def length(self) -> int:
        """Tokens known once what is launched has been read back."""
        return len(self.prompt) + self.launched

    @property
    def computed(self) -> int:
        """Tokens in the batch's cache once what is launched has been computed."""
        return self.length - 1

    @property
    def expected_length(self) -> int:
        """How long the sequence may well get: an early end is likelier than its limit."""
        return self.length + min(EXPECTED_TOKENS, self.limit - self.launched)

    def anew(self) -> "Sequence":
        """The same request with nothing computed, to go on after the tokens read back so far."""
        self.done = True  # whatever is in flight is drawn again, and comes out the same
        again = copy.copy(self)
        scored = None if self.reported else self.request.prompt_logprobs
        again.request = msgspec.structs.replace(
            self.request,
            prompt=self.prompt + self.completion,
            generated=len(self.completion),
            prompt_logprobs=scored,
        )
        again.prompt_logprobs = None if scored is None else [None]
        again.launched = len(self.completion)
        again.usable_keys = again._usable_keys()
        again.held, again.read, again.fetched = [], None, False
        again.in_flight = again.done = False
        again.constraint = None
        return again

    def constrain(self, grammar: "Grammar") -> None:
        """Bind what is to come to `grammar`. Raises GrammarError when nothing could end it."""
        from mlx_server.engine.grammar.grammar import Constraint  # loaded by now

        self.stop_tokens = grammar.ends(self.stop_tokens)
        self.constraint = Constraint(grammar, self.stop_tokens, self.completion)

    def accept(self, token: int, logprobs: Logprobs | None) -> Row:
        """Take note of the next token read back; says what to report of it."""
        self.completion.append(token)
        finish: FinishReason | None = None
        if token in self.stop_tokens:
            finish = "stop"
        elif len(self.completion) >= self.limit:
            finish = "length"
        elif self.constraint is not None:
            self.constraint.tell(token)
        self.done = finish is not None
        return self.report([token], finish, [logprobs] if logprobs else None)

    def report(
        self,
        tokens: list[int],
        finish: FinishReason | None,
        logprobs: list[Logprobs] | None = None,
    ) -> Row:
        """A row for the front; the first one carries what is known of the prompt."""
        first, self.reported = not self.reported, True
        self.suspect = False
        return Row(
            id=self.id,
            tokens=tokens,
            finish=finish,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if first else None,
            cached=self.cached if first else None,
        )


def store(
    prefix: PrefixCache, sequence: Sequence, cache: Cache, row: int, computed: int
) -> list[mx.array]:
    """Keep the whole blocks of a row of `cache` that holds `computed` tokens of `sequence`.

    Returns what is to be evaluated before the cache is next written to.
    """
    tokens = sequence.prompt + sequence.completion
    extend_keys(sequence.keys, tokens)
    keys = sequence.keys[: min(computed, len(tokens)) // BLOCK]
    return prefix.store(tokens, keys, cache, row, prefix.layout.padding(cache, computed))


def logprob_entries(tokens: list[int], read: tuple[mx.array, ...]) -> list[Logprobs]:
    """What `token_logprobs` returned for `tokens`, position by position."""
    chosen = cast(list[float], read[0].tolist())
    tops: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if len(read) > 1:
        ids = cast(list[list[int]], read[1].tolist())
        values = cast(list[list[float]], read[2].tolist())
        tops = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [Logprobs(*entry) for entry in zip(tokens, chosen, tops, strict=True)]
