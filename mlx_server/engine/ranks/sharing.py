"""What the ranks of a model have in common while each computes its part of a pass.

All build and evaluate the same passes in the same order, since they follow the same Plans: sums are
told apart by nothing but their order. Rank 0 alone draws: its tokens go around between the passes,
as sums to which the others add nothing.
"""

import os
from collections.abc import Mapping
from collections.abc import Sequence as Many
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

import mlx.core as mx

from mlx_server.engine.grammar.masks import Masks, MaskThread
from mlx_server.engine.plan import Plan
from mlx_server.engine.protocol import Memory, RankStats
from mlx_server.engine.ranks.messages import (
    Forget,
    Guesses,
    Problems,
    Rest,
    Sleep,
    ToRank,
    Turn,
)
from mlx_server.engine.sampling.sampler import BatchSampler, Draw, SampledRow

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Allowed

FoundGuesses = Mapping[int, list[int]]


class Sampler(Protocol):
    def launch(self, logits: mx.array, masks: Masks | None = None) -> Draw: ...


class Ranks(Protocol):
    """This process's part in computing a model: `rank` of `size`."""

    rank: int
    size: int

    @property
    def group(self) -> mx.distributed.Group | None:
        """What a model is divided among; None of one process."""

    def agreed(self, value: float) -> float:
        """What rank 0 has found. All must ask, and decide by the answer."""

    def most(self, value: int) -> int:
        """The largest that any has found. All must ask."""

    def least(self, value: int) -> int:
        """The smallest that any has found. All must ask."""

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds in all of them. All must ask."""

    def begin(self, plan: Plan) -> None: ...

    def rest(self, prefix_limit: int) -> None: ...

    def forget(self) -> None: ...

    def sleep(self) -> None: ...

    def sampler(
        self,
        rows: Many[SampledRow],
        inputs: mx.array,
        vocab_size: int,
        logprobs: Many[int | None],
        constrained: Many[int],
    ) -> Sampler: ...

    def masks(self, thread: MaskThread) -> Masks:
        """Of a step in which some row has a grammar."""

    def guesses(self, found: FoundGuesses) -> FoundGuesses:
        """What is verified in a pass; `found` is what this process would guess."""

    def stats(self, own: Memory) -> list[RankStats]:
        """Of all ranks, if there are several; `own` is this one's memory."""

    def stop(self) -> None:
        """Nothing more is to be computed: let all that have to tidy up begin."""

    def close(self) -> None:
        """Returns once all other ranks have ended."""


class Alone:
    """One process computes the model."""

    rank, size = 0, 1
    group: mx.distributed.Group | None = None

    def agreed(self, value: float) -> float:
        return value

    def most(self, value: int) -> int:
        return value if self.group is None else _most(value, self.group)

    def least(self, value: int) -> int:
        return -self.most(-value)

    def everywhere(self, holds: bool) -> bool:
        return not self.most(int(not holds))

    def begin(self, plan: Plan) -> None: ...

    def rest(self, prefix_limit: int) -> None: ...

    def forget(self) -> None: ...

    def sleep(self) -> None: ...

    def sampler(
        self,
        rows: Many[SampledRow],
        inputs: mx.array,
        vocab_size: int,
        logprobs: Many[int | None],
        constrained: Many[int],
    ) -> Sampler:
        return BatchSampler(rows, inputs, vocab_size, logprobs, constrained)

    def masks(self, thread: MaskThread) -> Masks:
        return Masks(thread)

    def guesses(self, found: FoundGuesses) -> FoundGuesses:
        return found

    def stats(self, own: Memory) -> list[RankStats]:
        return []

    def stop(self) -> None: ...

    def close(self) -> None: ...


ALONE = Alone()


class Followers(Protocol):
    """The other ranks to rank 0."""

    def tell(self, message: ToRank) -> None: ...

    def stats(self) -> list[RankStats]: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Leading(Alone):
    """Rank 0: tells `followers` what it does before it does it."""

    def __init__(self, group: mx.distributed.Group, followers: Followers) -> None:
        self.group = self._ring = group
        self.size = group.size()
        self._followers = followers

    def agreed(self, value: float) -> float:
        return _agreed(value, self._ring)

    def begin(self, plan: Plan) -> None:
        self._followers.tell(Turn(plan))

    def rest(self, prefix_limit: int) -> None:
        self._followers.tell(Rest(prefix_limit))

    def forget(self) -> None:
        self._followers.tell(Forget())

    def sleep(self) -> None:
        self._followers.tell(Sleep())

    def sampler(
        self,
        rows: Many[SampledRow],
        inputs: mx.array,
        vocab_size: int,
        logprobs: Many[int | None],
        constrained: Many[int],
    ) -> Sampler:
        own = BatchSampler(rows, inputs, vocab_size, logprobs, constrained)
        return _ToldSampler(own, self._ring)

    def masks(self, thread: MaskThread) -> Masks:
        return _ToldMasks(thread, self._followers)

    def guesses(self, found: FoundGuesses) -> FoundGuesses:
        self._followers.tell(Guesses(dict(found)))
        return found

    def stats(self, own: Memory) -> list[RankStats]:
        return [RankStats(0, os.getpid(), own), *self._followers.stats()]

    def stop(self) -> None:
        self._followers.stop()

    def close(self) -> None:
        self._followers.close()


class Leader(Protocol):
    """Rank 0 to another rank; both wait."""

    def guesses(self) -> Guesses: ...

    def problems(self) -> Problems: ...


class Following(Alone):
    """Any other rank: does what rank 0 has told, and draws nothing."""

    def __init__(self, group: mx.distributed.Group, leader: Leader) -> None:
        self.group = self._ring = group
        self.rank, self.size = group.rank(), group.size()
        self._leader = leader

    def agreed(self, value: float) -> float:
        return _agreed(0.0, self._ring)

    def sampler(
        self,
        rows: Many[SampledRow],
        inputs: mx.array,
        vocab_size: int,
        logprobs: Many[int | None],
        constrained: Many[int],
    ) -> Sampler:
        return _HeardSampler(len(rows), self._ring)

    def masks(self, thread: MaskThread) -> Masks:
        return _HeardMasks(thread, self._leader)

    def guesses(self, found: FoundGuesses) -> FoundGuesses:
        return self._leader.guesses().tokens


def _agreed(value: float, group: mx.distributed.Group) -> float:
    return cast(float, _first(mx.array(value, dtype=mx.float32), group).item())


def _most(value: int, group: mx.distributed.Group) -> int:
    most = mx.distributed.all_max(mx.array(value, dtype=mx.int64), group=group)
    return cast(int, most.item())


def _first(array: mx.array, group: mx.distributed.Group) -> mx.array:
    """Rank 0's `array`, to which the others bring zeros."""
    return mx.distributed.all_sum(array, group=group)


class _ToldSampler:
    def __init__(self, own: BatchSampler, group: mx.distributed.Group) -> None:
        self._own = own
        self._group = group

    def launch(self, logits: mx.array, masks: Masks | None = None) -> Draw:
        return _ToldDraw(self._own.launch(logits, masks), logits, self._group)


class _ToldDraw:
    """Rank 0's draw."""

    def __init__(self, own: Draw, logits: mx.array, group: mx.distributed.Group) -> None:
        self._own = own
        self._logits = logits
        self._group = group

    @cached_property
    def tokens(self) -> mx.array:
        return _first(self._own.tokens, self._group)

    def start(self) -> None:
        # First what all ranks evaluate, so that sums come in the same order everywhere.
        mx.async_eval(self._logits)  # type: ignore[no-untyped-call]
        self._own.start()

    def finish(self) -> None:
        self._own.finish()
        mx.async_eval(self.tokens)  # type: ignore[no-untyped-call]

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return self._own.logprobs()


class _HeardSampler:
    def __init__(self, rows: int, group: mx.distributed.Group) -> None:
        self._rows = rows
        self._group = group

    def launch(self, logits: mx.array, masks: Masks | None = None) -> Draw:
        return _HeardDraw(logits, self._rows, self._group)


class _HeardDraw:
    """A draw that rank 0 makes."""

    def __init__(self, logits: mx.array, rows: int, group: mx.distributed.Group) -> None:
        self._logits = logits
        self.tokens = _first(mx.zeros(rows, dtype=mx.uint32), group)

    def start(self) -> None:
        mx.async_eval(self._logits)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        # Not all ranks of a pipeline read tokens in the next pass, before which they must come.
        mx.async_eval(self.tokens)  # type: ignore[no-untyped-call]

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return None


class _ToldMasks(Masks):
    def __init__(self, thread: MaskThread, followers: Followers) -> None:
        super().__init__(thread)
        self._followers = followers
        self._told = False

    def wait(self) -> "Allowed | None":
        allowed = super().wait()
        if not self._told:
            self._told = True
            self._followers.tell(Problems(sorted(allowed.problems) if allowed else []))
        return allowed


class _HeardMasks(Masks):
    def __init__(self, thread: MaskThread, leader: Leader) -> None:
        super().__init__(thread)
        self._leader = leader

    def wait(self) -> "Allowed | None":
        """To be called once; None if all rows can go on."""
        places = self._leader.problems().places
        if not places:
            return None
        import numpy as np

        from mlx_server.engine.grammar.grammar import Allowed

        words = np.zeros((0, 0), dtype=np.uint32)
        return Allowed([], words, {}, dict.fromkeys(places, "as rank 0 says"))
