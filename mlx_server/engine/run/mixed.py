"""One forward pass over rows of several caches: sequences that decode, and a chunk of a prompt.

A step of decoding reads all weights for a few rows, and so does a small chunk of prefill. Done in
one pass they are read once, which is what piggybacking a chunk on a decode step is about (Agrawal
et al. 2023, SARATHI). It also lets sequences of very different lengths keep caches of their own,
none padded to the longest.

Every token becomes a row of length one, at a position of its own, so that all but the attention is
one operation for all of them. The model's own code does that: it is given `MixedLayer`s for
caches, and calls a `scaled_dot_product_attention` that knows them.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlx_server.engine.cache.layout import Cache

ATTENTION = "scaled_dot_product_attention"
TOLERANCE = 0.02
"""Of the largest logit: how far a mixed pass may be from separate ones. A mistake shows as more."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens (rows, tokens) that go to one cache. All parts but the last have one token a row."""

    tokens: mx.array
    cache: Cache

    @property
    def shape(self) -> tuple[int, int]:
        rows, tokens = self.tokens.shape
        return rows, tokens

    def positions(self) -> mx.array:
        rows, tokens = self.shape
        offset = mx.array(self.cache[0].offset).reshape(-1, 1)
        return mx.broadcast_to(offset + mx.arange(tokens), (rows, tokens)).flatten()


class MixedLayer:
    """One layer's caches of all parts, as the model sees them: a cache of single-token rows.

    Keys, values and masks are lists with an item for each part; only `attend` looks into them.
    """

    def __init__(self, parts: Sequence[Part], layer: int, positions: mx.array, answers: int):
        self.caches = [part.cache[layer] for part in parts]
        self.shapes = [part.shape for part in parts]
        self.offset = positions
        self.answers = answers
        """Rows, from the first on, whose logits are wanted."""

    def make_mask(self, _: int, **options: Any) -> list[Any]:
        pairs = zip(self.caches, self.shapes, strict=True)
        return [cache.make_mask(tokens, **options) for cache, (_, tokens) in pairs]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[list[Any], list[Any]]:
        """Give every cache its rows of `keys` and `values`, each (rows, heads, 1, width)."""
        parts = zip(self.caches, self.split(keys), self.split(values), strict=True)
        both = [cache.update_and_fetch(k, v) for cache, k, v in parts]
        return [k for k, _ in both], [v for _, v in both]

    def split(self, array: mx.array) -> list[mx.array]:
        """The parts of an array (rows, heads, 1, width), each (its rows, heads, tokens, width)."""
        parts, start = [], 0
        for rows, tokens in self.shapes:
            end = start + rows * tokens
            part = array[start:end]
            parts.append(part if tokens == 1 else part.swapaxes(0, 2))
            start = end
        return parts

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        shapes = zip(parts, self.shapes, strict=True)
        return mx.concatenate([p if tokens == 1 else p.swapaxes(0, 2) for p, (_, tokens) in shapes])


def attend(
    original: Callable[..., mx.array],
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    **rest: Any,
) -> mx.array:
    if not isinstance(cache, MixedLayer):
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **rest)
    parts = zip(cache.split(queries), keys, values, cache.caches, mask, strict=True)
    return cache.join(
        [original(q, k, v, cache=one, scale=scale, mask=m, **rest) for q, k, v, one, m in parts]
    )


def forward(model: Any, parts: Sequence[Part], answers: int) -> mx.array:
    """Logits (answers, 1, vocab) of the first `answers` rows; grows the cache of every part.

    `model` must be one for which `enable` returned None.
    """
    tokens = mx.concatenate([part.tokens.flatten() for part in parts])
    positions = mx.concatenate([part.positions() for part in parts])
    layers = range(len(parts[0].cache))
    cache = [MixedLayer(parts, layer, positions, answers) for layer in layers]
    logits: mx.array = model(tokens[:, None], cache=cache)
    return logits


def enable(model: Any, new_cache: Callable[[], Cache], merge: Callable[..., Cache]) -> str | None:
    """Prepare `model` for `forward` and try it; says what is in the way, if anything is.

    `new_cache` makes an empty cache of one sequence, `merge` one of several such.
    """
    with ExitStack() as undo:
        obstacle = _obstacle(model, new_cache, merge, undo)
        if obstacle is None:
            undo.pop_all()
    return obstacle


def _obstacle(
    model: Any, new_cache: Callable[[], Cache], merge: Callable[..., Cache], undo: ExitStack
) -> str | None:
    try:
        _install(model, undo)
        error = _error(model, new_cache, merge)
    except Exception as failure:  # noqa: BLE001
        # The code of some families asks more of a cache, in ways as many as there are families.
        return f"{type(failure).__name__}: {failure}"
    return None if error <= TOLERANCE else f"logits differ by {error:.2g} of the largest"


def _install(model: Any, undo: ExitStack) -> None:
    """Teach the model's attention and its body about mixed layers."""
    body = _body(model)
    kind = type(body)
    body.__class__ = type(kind.__name__, (_Body, kind), {"__module__": kind.__module__})
    undo.callback(setattr, body, "__class__", kind)
    names = {type(module).__module__ for module in model.modules()}
    homes = [home for name in names if hasattr(home := sys.modules.get(name), ATTENTION)]
    for home in homes:
        original = getattr(home, ATTENTION)
        setattr(home, ATTENTION, _knowing(original))
        undo.callback(setattr, home, ATTENTION, original)


def _knowing(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attention(
        queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, **rest: Any
    ) -> mx.array:
        return attend(original, queries, keys, values, cache, scale, mask, **rest)

    return attention


def _body(model: Any) -> Any:
    """The part of a model that turns tokens into hidden states, before the output projection."""
    return getattr(model, "language_model", model).model


class _Body:
    """Mixed into a model's body: hands on only those rows whose logits are wanted."""

    def __call__(self, inputs: mx.array, cache: Any = None, *args: Any, **options: Any) -> Any:
        hidden = super().__call__(inputs, cache, *args, **options)  # type: ignore[misc]
        if cache and isinstance(cache[0], MixedLayer):
            return hidden[: cache[0].answers]
        return hidden


def _error(model: Any, new_cache: Callable[[], Cache], merge: Callable[..., Cache]) -> float:
    """How far a mixed pass is from separate ones, relative to the largest logit."""
    begun = [new_cache() for _ in range(4)]
    for length, cache in enumerate(begun, 2):
        model(mx.arange(length)[None], cache=cache)
    caches = [merge(begun[:1]), merge(begun[1:3]), begun[3]]

    def tokens(rows: int, length: int) -> mx.array:
        return mx.arange(rows * length).reshape(rows, length) + 3

    one, two, prompt = copy.deepcopy(caches)
    expected = [model(tokens(1, 1), cache=one), model(tokens(2, 1), cache=two)]
    model(tokens(1, 5), cache=prompt)
    expected.append(model(tokens(1, 1), cache=prompt))
    one, two, prompt = caches
    parts = [Part(tokens(1, 1), one), Part(tokens(2, 1), two), Part(tokens(1, 5), prompt)]
    found = [forward(model, parts, 3), model(tokens(1, 1), cache=prompt)]
    separate = mx.concatenate(expected).astype(mx.float32)
    mixed = mx.concatenate(found).astype(mx.float32)
    return cast(float, (mx.abs(separate - mixed).max() / mx.abs(separate).max()).item())
