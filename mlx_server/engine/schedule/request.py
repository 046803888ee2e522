"""A request that waits for its place, and what has been prepared for it."""

from concurrent.futures import Future
from typing import TYPE_CHECKING

from msgspec import structs

from mlx_server.engine.plan import Start
from mlx_server.engine.protocol import Generate
from mlx_server.engine.sequence import expected_length, token_limit, usable_keys

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Grammar


class WaitingRequest:
    """`keys` names its prompt's blocks that may be cached, `wanted` those being read from disk.

    `fetched_after` is how many blocks were in memory when the disk was last asked.
    """

    def __init__(self, start: Start, context_length: int) -> None:
        request: Generate = start.request
        self.start = start
        self.request = request
        self.id = request.id
        self.keys = usable_keys(start)
        self.length = len(request.prompt)
        left = token_limit(request, context_length) - request.generated
        self.decodes = left > 0
        self.expected_length = expected_length(self.length, left)
        self.wanted: list[bytes] = []
        self.fetched_after = -1
        self.grammar: Future[Grammar] | None = None
        self.bound = request.grammar is None
        """Whether its grammar, if it has one, is compiled."""

    def bind(self, grammar: "Grammar") -> None:
        """Its grammar is compiled. Raises GrammarError if nothing could end it."""
        ends = sorted(grammar.ends(frozenset(self.request.stop_tokens)))
        self.request = structs.replace(self.request, stop_tokens=ends)
        self.start = structs.replace(self.start, request=self.request)
        self.bound = True

    @property
    def scored(self) -> bool:
        return self.request.prompt_logprobs is not None
