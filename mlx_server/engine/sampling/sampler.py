"""Drawing the next tokens of a whole batch, each row with settings of its own.

Randomness is counter-based: the draw at step i of a request is a hash of its seed and i, mapped
through the inverse of the row's cumulative distribution. So a request's text does not depend on
what else is in the batch, and a later engine can go on where an earlier one stopped.

The distribution is laid out in one order on every device: by token where nothing filters it, and
by falling probability, of equals the lowest token first, where top-k, top-p or min-p do.
"""

from collections.abc import Sequence as Many
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_server.engine.memory import device_name
from mlx_server.engine.protocol import Sampling
from mlx_server.engine.sampling import graph as device_sampling
from mlx_server.engine.sampling.graph import COLDEST, DeviceSampler, SampledRow, penalises

if TYPE_CHECKING:
    from mlx_server.engine.grammar.masks import Masks
    from mlx_server.engine.sampling.host import HostSampler

__all__ = ["BatchSampler", "Draw", "LogprobReader", "SampledRow", "token_logprobs", "uniform"]

MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, in steps of 2⁻²³.

    Two rounds of the finaliser of SplitMix64 (Steele, Lea and Flood 2014). 23 bits, so that the
    product with a float32 total always stays below that total.
    """
    return (_mix(_mix(seed & MASK64) ^ (position + 1)) >> 41) * 2.0**-23


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


class Draw(Protocol):
    """The tokens of one step, drawn on the device or to be drawn on the host.

    So the host can build the next step's graph while the device still computes this step's logits.
    """

    @property
    def tokens(self) -> mx.array:
        """(rows,) uint32, to be built upon at once, but evaluated only after `finish`.

        Where they come out of a graph with masks in it, this waits for the masks.
        """

    def start(self) -> None:
        """Have the device begin with all that it has to do for this step."""

    def finish(self) -> None:
        """Make `tokens` valid, which may mean to wait for the logits."""

    def logprobs(self) -> tuple[mx.array, ...] | None:
        """What `LogprobReader` reads, after `finish`."""


class BatchSampler:
    """The sampling state of the running batch, built anew whenever its membership changes.

    Rows that ask for nothing cost nothing: a batch of greedy rows is one argmax.
    """

    def __init__(
        self,
        rows: Many[SampledRow],
        inputs: mx.array,
        vocab_size: int,
        logprobs: Many[int | None] = (),
        constrained: Many[int] = (),
    ) -> None:
        """`inputs` (rows,) are the tokens the next step will feed to the model.

        `logprobs` tells for each row how many alternatives it asks for, None for nothing.
        `constrained` are the places of rows for which there are masks.
        """
        self.rows = rows
        self.reader = LogprobReader(list(logprobs))
        plain = self.reader.index is None and not constrained
        plain = plain and all(_is_argmax(row.sampling) for row in rows)
        new = _host_sampler if _on_host() and not plain else DeviceSampler
        self._sampler = new(rows, inputs, vocab_size)

    def launch(self, logits: mx.array, masks: "Masks | None" = None) -> Draw:
        """The draw from `logits` (rows, vocab) float32; steps are to finish in their order.

        `masks` are those of the constrained rows, to be begun before anybody waits for them.
        """
        shares = [uniform(row.sampling.seed, row.position) for row in self.rows]
        if not isinstance(self._sampler, DeviceSampler):
            return _HostDraw(self._sampler, self.reader, logits, shares, masks)
        if masks is not None:
            return _MaskedDraw(self._sampler, self.reader, logits, shares, masks)
        tokens = self._sampler.sample(logits, shares)
        return _DeviceDraw(tokens, self.reader.read(logits, tokens))

    def sample(self, logits: mx.array) -> mx.array:
        """Tokens (rows,) uint32 drawn from `logits` (rows, vocab) float32."""
        draw = self.launch(logits)
        draw.finish()
        return draw.tokens


def _is_argmax(sampling: Sampling) -> bool:
    return sampling.temperature < COLDEST and not sampling.logit_bias and not penalises(sampling)


def _on_host() -> bool:
    """Whether the host can read logits where they are, and is the faster at sampling."""
    return device_name() == "cpu"


def _host_sampler(rows: Many[SampledRow], inputs: mx.array, vocab_size: int) -> "HostSampler":
    from mlx_server.engine.sampling.host import HostSampler  # and NumPy, which takes a while

    return HostSampler(rows, inputs, vocab_size)


class _DeviceDraw:
    """Tokens that come out of the graph; the host has nothing to do for them."""

    def __init__(self, tokens: mx.array, logprobs: tuple[mx.array, ...] | None) -> None:
        self.tokens = tokens
        self._logprobs = logprobs

    def start(self) -> None:
        mx.async_eval(self.tokens, self._logprobs or ())  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Nothing: whoever evaluates the tokens waits for them."""

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return self._logprobs


class _MaskedDraw:
    """Tokens that come out of the graph, the last of which is built when the masks are known."""

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
        """The tokens and what `LogprobReader` reads, on which the device has begun."""
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
        """Have the device draw, if that has not been asked for."""
        _ = self._drawn

    def logprobs(self) -> tuple[mx.array, ...] | None:
        return self._drawn[1]


class _HostDraw:
    """Tokens that the host draws as soon as their logits are there, and writes where they belong.

    `tokens` shares its memory with NumPy, so that graphs built on it see what `finish` writes.
    """

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
    """Log-probabilities of sampled tokens, computed for the rows that ask and for no other."""

    def __init__(self, wanted: list[int | None]) -> None:
        """`wanted` holds for each row how many alternatives it asks for, None for nothing."""
        asking = [row for row, count in enumerate(wanted) if count is not None]
        self.index = mx.array(asking) if asking else None
        self.most = max((count for count in wanted if count is not None), default=0)

    def read(self, logits: mx.array, tokens: mx.array) -> tuple[mx.array, ...] | None:
        """See `token_logprobs`, of the asking rows of `logits` (rows, vocab)."""
        if self.index is None:
            return None
        if _on_host():
            return _host_logprobs(logits, tokens, self.most, self.index)
        return device_sampling.token_logprobs(logits[self.index], tokens[self.index], self.most)


def token_logprobs(logits: mx.array, tokens: mx.array, most: int) -> tuple[mx.array, ...]:
    """Log-probabilities under `logits` (rows, vocab) of `tokens` (rows,) and of the best `most`.

    Returns chosen (rows,), best ids (rows, most) in falling order, and their values (rows, most).
    On a CPU device this waits for the logits.
    """
    if _on_host():
        return _host_logprobs(logits, tokens, most, mx.arange(tokens.shape[0]))
    return device_sampling.token_logprobs(logits, tokens, most)


def _host_logprobs(
    logits: mx.array, tokens: mx.array, most: int, index: mx.array
) -> tuple[mx.array, ...]:
    from mlx_server.engine.sampling.host import token_logprobs

    return token_logprobs(logits, tokens, most, index)
