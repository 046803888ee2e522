"""Rows of equal length in the caches that mlx-lm has for a single sequence.

Those know no padding: an offset is a number, nothing is masked, and whatever a layer keeps has rows
along its first axis. So they serve models that cannot compute rows of several lengths together.
"""

import copy
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from mlx_server.engine.cache.layout import Cache

Arrays = Any
"""An array, or a tuple or list of them, some perhaps None."""


def merge(caches: list[Cache]) -> Cache:
    """One cache with a row for each. Raises ValueError where their lengths differ."""
    if len(caches) == 1:
        return caches[0]
    return [_joined(layers) for layers in zip(*caches, strict=True)]


def extend(cache: Cache, other: Cache) -> Cache:
    """Both sets of rows, which are equally long."""
    return merge([cache, other])


def keep_rows(cache: Cache, rows: list[int]) -> Cache:
    kept = mx.array(rows)
    return [_changed(layer, lambda array: array[kept]) for layer in cache] if rows else []


def _joined(layers: Many[Any]) -> Any:
    if isinstance(layers[0], CacheList):
        parts = zip(*(layer.caches for layer in layers), strict=True)
        return CacheList(*(_joined(part) for part in parts))
    compact = [_compact(layer) for layer in layers]
    if len({getattr(layer, "offset", None) for layer in compact}) > 1:
        raise ValueError("only caches of equal length can be one")
    if isinstance(compact[0], RotatingKVCache):
        _cut_to_shortest(compact)
    joined = copy.copy(compact[0])
    for name, value in vars(joined).items():
        setattr(joined, name, _concatenated(value, [vars(layer)[name] for layer in compact]))
    return joined


def _compact(layer: Any) -> Any:
    """A copy that holds its tokens in their order and no room beyond them."""
    layer = copy.copy(layer)
    vars(layer).pop("step", None)  # sized for one prompt
    if getattr(layer, "keys", None) is None:
        return layer
    if isinstance(layer, RotatingKVCache):
        layer.keys, layer.values = map(layer._temporal_order, (layer.keys, layer.values))
        layer._idx = layer.keys.shape[2]
    elif isinstance(layer, ChunkedKVCache):
        layer.maybe_trim_front()
        layer.keys, layer.values = layer.keys_and_values()
    elif isinstance(layer, KVCache):
        end = layer.offset
        layer.keys, layer.values = tree_map(
            lambda array: array[..., :end, :], (layer.keys, layer.values)
        )
    return layer


def _cut_to_shortest(layers: Many[RotatingKVCache]) -> None:
    """Windows just computed in a chunk hold more tokens than they need."""
    if any(layer.keys is None for layer in layers):
        return
    shortest = min(layer._idx for layer in layers)
    for layer in layers:
        layer.keys, layer.values = layer.keys[..., -shortest:, :], layer.values[..., -shortest:, :]
        layer._idx = shortest


def _concatenated(first: Arrays, values: list[Arrays]) -> Arrays:
    if isinstance(first, mx.array):
        return mx.concatenate(values)
    if isinstance(first, list | tuple):
        members = zip(*values, strict=True)
        return type(first)(_concatenated(many[0], list(many)) for many in members)
    if first is None and any(value is not None for value in values):
        raise ValueError("some of these caches are empty and some are not")
    return first


def _changed(layer: Any, change: Callable[[mx.array], mx.array]) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*(_changed(part, change) for part in layer.caches))
    layer = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(layer, name, _mapped(value, change))
    return layer


def _mapped(value: Arrays, change: Callable[[mx.array], mx.array]) -> Arrays:
    if isinstance(value, mx.array):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
