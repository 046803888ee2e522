"""One forward pass over rows of several caches: sequences that decode, and a chunk of a prompt.

Rows may have several tokens, and not equally many.

Weights are then read once for both (piggybacking: Agrawal et al. 2023, SARATHI), and nothing is
padded to the longest sequence. Every token is a row of length one at its own position, so that only
attention tells parts apart.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.run.kv import merge

TOLERANCE = 0.02
"""Distance of logits that needs no explanation."""
TIMES_NOISE, MOST = 2.0, 0.3
"""A larger one may be so many times the model's own noise, up to a distance that mistakes make."""
TINY = 1e-30
CHUNK = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens (rows, tokens) for one cache, of which row i has `counts[i]`, or all."""

    tokens: mx.array
    cache: Cache
    counts: tuple[int, ...] | None = None

    @property
    def layout(self) -> "Layout":
        rows, tokens = self.tokens.shape
        return Layout(rows, tokens, self.counts)

    @property
    def row_counts(self) -> tuple[int, ...]:
        rows, tokens = self.tokens.shape
        return self.counts or (tokens,) * rows

    def positions(self) -> mx.array:
        rows, tokens = self.tokens.shape
        offset = mx.array(self.cache[0].offset).reshape(-1, 1)
        return self.layout.flat(mx.broadcast_to(offset + mx.arange(tokens), (rows, tokens)))


class Layout:
    """From (rows, tokens) to single tokens and back; what a row has too few of is padding."""

    def __init__(self, rows: int, tokens: int, counts: Sequence[int] | None = None) -> None:
        self.rows, self.tokens = rows, tokens
        self.count = rows * tokens
        self._taken: mx.array | None = None
        self._places: mx.array | None = None
        if counts is not None and min(counts) < tokens:
            self.count = sum(counts)
            starts = [0, *itertools.accumulate(counts)]
            self._taken = mx.array([r * tokens + t for r in range(rows) for t in range(counts[r])])
            self._places = mx.array(
                [starts[r] + min(t, counts[r] - 1) for r in range(rows) for t in range(tokens)]
            )

    @property
    def single(self) -> bool:
        """Whether each row has one token."""
        return self.tokens == 1 and self._taken is None

    def flat(self, array: mx.array) -> mx.array:
        """(rows, tokens, …) to (count, …)."""
        flat = array.reshape(self.rows * self.tokens, *array.shape[2:])
        return flat if self._taken is None else flat[self._taken]

    def gathered(self, array: mx.array) -> mx.array:
        """(count, …) to (rows, tokens, …)."""
        filled = array if self._places is None else array[self._places]
        return filled.reshape(self.rows, self.tokens, *array.shape[1:])


class MixedLayer:
    """What a model takes for one layer's cache of single-token rows.

    Keys, values and masks are lists with an item per part. The logits of the first `answers`
    tokens are wanted, or of those at these places.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        layouts: Sequence[Layout],
        layer: int,
        positions: mx.array,
        answers: int | mx.array,
    ) -> None:
        self.caches = [part.cache[layer] for part in parts]
        self.layouts = layouts
        self.offset = positions
        self.answers = answers

    @property
    def keys(self) -> Any:
        """For mlx-lm's pipelines, which have them depend on what goes to the next rank."""
        return self.caches[0].keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self.caches[0].keys = keys

    def make_mask(self, _: int, **options: Any) -> list[Any]:
        pairs = zip(self.caches, self.layouts, strict=True)
        return [cache.make_mask(layout.tokens, **options) for cache, layout in pairs]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[list[Any], list[Any]]:
        """`keys` and `values` are (rows, heads, 1, width)."""
        parts = zip(self.caches, self.split(keys), self.split(values), strict=True)
        both = [cache.update_and_fetch(k, v) for cache, k, v in parts]
        return [k for k, _ in both], [v for _, v in both]

    def split(self, array: mx.array) -> list[mx.array]:
        """(rows, heads, 1, width) to (part rows, heads, tokens, width) each."""
        parts, start = [], 0
        for layout in self.layouts:
            end = start + layout.count
            part = array[start:end]
            if not layout.single:
                part = layout.gathered(part.squeeze(2)).swapaxes(1, 2)
            parts.append(part)
            start = end
        return parts

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        flat = []
        for part, layout in zip(parts, self.layouts, strict=True):
            single = layout.single
            flat.append(part if single else layout.flat(part.swapaxes(1, 2))[:, :, None])
        return mx.concatenate(flat)


def attention_by_part(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """mlx-lm's `scaled_dot_product_attention`, part by part for a `MixedLayer`."""

    @wraps(original)
    def attention(
        queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, **rest: Any
    ) -> mx.array:
        if not isinstance(cache, MixedLayer):
            return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **rest)
        parts = zip(cache.split(queries), keys, values, cache.caches, mask, strict=True)
        return cache.join(
            [original(q, k, v, cache=one, scale=scale, mask=m, **rest) for q, k, v, one, m in parts]
        )

    return attention


def body_of_answers(kind: type) -> type:
    """Returns only rows whose logits are wanted."""

    class Body(kind):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None, *args: Any, **options: Any) -> Any:
            hidden = super().__call__(inputs, cache, *args, **options)
            if cache and isinstance(cache[0], MixedLayer):
                answers = cache[0].answers
                return hidden[answers if isinstance(answers, mx.array) else slice(answers)]
            return hidden

    Body.__name__, Body.__module__ = kind.__name__, kind.__module__
    return Body


def forward(model: Any, parts: Sequence[Part], answers: int | mx.array) -> mx.array:
    """Logits (answers, 1, vocab) of the first `answers` tokens, or of those at these places; grows
    all caches, each row by as many tokens as its part's longest has.

    Needs `patches.enable_mixed_passes`.
    """
    layouts = [part.layout for part in parts]
    pairs = zip(parts, layouts, strict=True)
    tokens = mx.concatenate([layout.flat(part.tokens) for part, layout in pairs])
    positions = mx.concatenate([part.positions() for part in parts])
    layers = range(len(parts[0].cache))
    cache = [MixedLayer(parts, layouts, layer, positions, answers) for layer in layers]
    logits: mx.array = model(tokens[:, None], cache=cache)
    return logits


def mistake(
    model: Any, new_cache: Callable[[], Cache], agreed: Callable[[float], float] = float
) -> str | None:
    """What is wrong with the logits of a mixed pass, if anything.

    Half precision rounds otherwise in each shape of batch, so they are measured against what
    another shape does to the logits of separate passes.
    """
    expected = _separate(model, new_cache)
    error = agreed(_distance(_mixed(model, new_cache), expected))
    if error <= TOLERANCE:
        return None
    noise = agreed(_distance(_regrouped(model, new_cache), expected))
    if error <= min(MOST, TIMES_NOISE * noise):
        return None
    return f"its logits differ by {error:.2g}, those of two shapes of batch by {noise:.2g}"


def _mixed(model: Any, new_cache: Callable[[], Cache]) -> mx.array:
    """Logits (4, vocab) of three rows beside a chunk of a fourth, and of the token after it."""
    *rows, prompt = _begun(model, new_cache)
    parts = [Part(_tokens(1, 1), merge(rows[:1])), Part(_tokens(2, 1), merge(rows[1:]))]
    steps = forward(model, [*parts, Part(_tokens(1, CHUNK), prompt)], 3)
    return mx.concatenate([steps, model(_tokens(1, 1), cache=prompt)])[:, 0]


def _separate(model: Any, new_cache: Callable[[], Cache]) -> mx.array:
    """The same in passes of their own."""
    *rows, prompt = _begun(model, new_cache)
    one = model(_tokens(1, 1), cache=merge(rows[:1]))
    two = model(_tokens(2, 1), cache=merge(rows[1:]))
    model(_tokens(1, CHUNK), cache=prompt)
    return mx.concatenate([one, two, model(_tokens(1, 1), cache=prompt)])[:, 0]


def _regrouped(model: Any, new_cache: Callable[[], Cache]) -> mx.array:
    """The same with all rows in one batch, and the chunk token by token."""
    *rows, prompt = _begun(model, new_cache)
    tokens = mx.concatenate([_tokens(1, 1), _tokens(2, 1)])
    steps = model(tokens, cache=merge(rows))
    for token in range(CHUNK):
        model(_tokens(1, CHUNK)[:, token : token + 1], cache=prompt)
    return mx.concatenate([steps, model(_tokens(1, 1), cache=prompt)])[:, 0]


def _begun(model: Any, new_cache: Callable[[], Cache]) -> list[Cache]:
    """Caches of four sequences of 2 to 5 tokens."""
    begun = [new_cache() for _ in range(4)]
    for length, cache in enumerate(begun, 2):
        model(mx.arange(length)[None], cache=cache)
    return begun


def _tokens(rows: int, length: int) -> mx.array:
    return mx.arange(rows * length).reshape(rows, length) + 3


def _distance(found: mx.array, expected: mx.array) -> float:
    """Of logits (rows, vocab), as a share of the expected ones' spread, in the row with most."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    spread = mx.linalg.norm(expected - expected.mean(axis=-1, keepdims=True), axis=-1)
    shares = mx.linalg.norm(found - expected, axis=-1) / mx.maximum(spread, TINY)
    return cast(float, shares.max().item())
