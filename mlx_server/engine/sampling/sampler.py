"""Drawing the next tokens of a whole batch, each row with its own settings.

Randomness is counter-based: the draw at step i of a request is a hash of its seed and i, mapped
through the inverse of the row's cumulative distribution. So a text does not depend on the rest of
the batch, and a later engine can resume it.
"""

from collections.abc import Sequence as Many
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_server.engine.memory import device_name
from mlx_server.engine.protocol import Sampling
from mlx_server.engine.sampling import graph
from mlx_server.engine.sampling.graph import COLDEST, DeviceSampler, SampledRow, penalises

if TYPE_CHECKING:
    from mlx_server.engine.grammar.masks import Masks
    from mlx_server.engine.sampling.host import HostSampler

__all__ = ["BatchSampler", "Draw", "LogprobReader", "SampledRow", "token_logprobs", "uniform"]

MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), in steps of 2⁻²³, so that its float32 product with a total is smaller.

    Two rounds of the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    return (_mix(_mix(seed & MASK64) ^ (position + 1)) >> 41) * 2.0**-23


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


class Draw(Protocol):
    """The tokens of one step, which the host may still have to draw."""

    @property
    def tokens(self) -> mx.array:
        """(rows,) uint32, to build upon at once, but to evaluate only after `finish`."""

    def start(self) -> None: ...

    def finish(self) -> None:
        """Make `tokens` valid; may wait for the logits."""

    def logprobs(self) -> tuple[mx.array, ...] | None: ...


class BatchSampler:
    """Built anew whenever the membership of the batch changes."""

    def __init__(
        self,
        rows: Many[SampledRow],
        inputs: mx.array,
        vocab_size: int,
        logprobs: Many[int | None] = (),
        constrained: Many[int] = (),
    ) -> None:
        """`inputs` (rows,) are the tokens the next step feeds to the model.

        `logprobs` is how many alternatives each row asks for, `constrained` the places with masks.
        """
        self.rows = rows
        self.reader = LogprobReader(list(logprobs))
        plain = self.reader.index is None and not constrained
        plain = plain and all(_is_argmax(row.sampling) for row in rows)
        new = _host_sampler if _on_host() and not plain else DeviceSampler
        self._sampler = new(rows, inputs, vocab_size)

    def launch(self, logits: mx.array, masks: "Masks | None" = None) -> Draw:
        """Draws from `logits` (rows, vocab) float32 must finish in order."""
        shares = [uniform(row.sampling.seed, row.position) for row in self.rows]
        if not isinstance(self._sampler, DeviceSampler):
            return _HostDraw(self._sampler, self.reader, logits, shares, masks)
        if masks is not None:
            return _MaskedDraw(self._sampler, self.reader, logits, shares, masks)
        tokens = self._sampler.sample(logits, shares)
        return _DeviceDraw(tokens, self.reader.read(logits, tokens))


def _is_argmax(sampling: Sampling) -> bool:
    return sampling.temperature < COLDEST and not sampling.logit_bias and not penalises(sampling)


def _on_host() -> bool:
    """Whether the host reads logits where they are, and samples faster."""
    return device_name() == "cpu"


def _host_sampler(rows: Many[SampledRow], inputs: mx.array, vocab_size: int) -> "HostSampler":
    from mlx_server.engine.sampling.host import HostSampler  # and NumPy, which takes a while

    return HostSampler(rows, inputs, vocab_size)


class _DeviceDraw:
    """The host has nothing to do."""

    def __init__(self, tokens: mx.array, logprobs: tuple[mx.array, ...] | None) -> None:
        self.tokens = tokens
        self._logprobs = logprobs

    def start(self) -> None:
        mx.async_eval(self.tokens, self._logprobs or ())  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Evaluating the tokens waits for them."""

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return self._logprobs


class _MaskedDraw:
    """The end of the graph is built once the masks are known."""

    def __init__(
        self,
        sampler: DeviceSampler,
        reader: "LogprobReader",
        logits: mx.array,
        shares: list[float],
        masks: "Masks",
    ) -> None:
        self._sampler, self._reader = sampler, reader
        self._logits, self._shares, self._masks = logits, shares, masks

    @cached_property
    def _drawn(self) -> tuple[mx.array, tuple[mx.array, ...] | None]:
        tokens = self._sampler.sample(self._logits, self._shares, self._masks.wait())
        logprobs = self._reader.read(self._logits, tokens)
        mx.async_eval(tokens, logprobs or ())  # type: ignore[no-untyped-call]
        return tokens, logprobs

    @property
    def tokens(self) -> mx.array:
        return self._drawn[0]

    def start(self) -> None:
        mx.async_eval(self._logits)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        _ = self._drawn

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return self._drawn[1]


class _HostDraw:
    """`tokens` shares memory with NumPy: graphs built on it see what `finish` writes."""

    def __init__(
        self,
        sampler: "HostSampler",
        reader: "LogprobReader",
        logits: mx.array,
        shares: list[float],
        masks: "Masks | None",
    ) -> None:
        self.tokens = mx.array([0] * len(shares), dtype=mx.uint32)
        self._sampler, self._reader = sampler, reader
        self._logits, self._shares, self._masks = logits, shares, masks

    def start(self) -> None:
        mx.async_eval(self._logits)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        allowed = self._masks.wait() if self._masks else None
        self._sampler.sample(self._logits, self._shares, self.tokens, allowed)

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return self._reader.read(self._logits, self.tokens)


class LogprobReader:
    """Reads log-probabilities only for rows that ask."""

    def __init__(self, wanted: list[int | None]) -> None:
        asking = [row for row, count in enumerate(wanted) if count is not None]
        self.index = mx.array(asking) if asking else None
        self.most = max((count for count in wanted if count is not None), default=0)

    def read(self, logits: mx.array, tokens: mx.array) -> tuple[mx.array, ...] | None:
        if self.index is None:
            return None
        if _on_host():
            return _host_logprobs(logits, tokens, self.most, self.index)
        return graph.token_logprobs(logits[self.index], tokens[self.index], self.most)


def token_logprobs(logits: mx.array, tokens: mx.array, most: int) -> tuple[mx.array, ...]:
    """Log-probabilities under `logits` (rows, vocab) of `tokens` (rows,) and of the best `most`.

    Returns chosen (rows,), best ids (rows, most) in falling order, and their values (rows, most).
    On a CPU device this waits for the logits.
    """
    if _on_host():
        return _host_logprobs(logits, tokens, most, mx.arange(tokens.shape[0]))
    return graph.token_logprobs(logits, tokens, most)


def _host_logprobs(
    logits: mx.array, tokens: mx.array, most: int, index: mx.array
) -> tuple[mx.array, ...]:
    from mlx_server.engine.sampling.host import token_logprobs

    return token_logprobs(logits, tokens, most, index)
