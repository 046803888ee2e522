"""Rows of equal length that share a cache made for one sequence keep what each of them held."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from mlx_server.engine.cache.quant import QuantizedKVCache
from mlx_server.engine.run import even, kv

WINDOW = 16
WIDTH = 64
CHUNKS = ([40], [16, 20, 1, 1, 1, 1], [1] * 40)
"""Of three rows, which hold the same number of tokens then."""

KINDS: dict[str, Callable[[], Any]] = {
    "whole": KVCache,
    "window": lambda: RotatingKVCache(WINDOW),
    "chunked": lambda: ChunkedKVCache(WINDOW),
    "quantized": lambda: QuantizedKVCache(8),
    "list": lambda: CacheList(KVCache(), RotatingKVCache(WINDOW)),
}


def feed(cache: Any, marks: mx.array) -> list[mx.array]:
    """Write tokens (rows, tokens), each as keys that are all its mark; returns what is held."""
    if isinstance(cache, CacheList):
        return [held for part in cache.caches for held in feed(part, marks)]
    if isinstance(cache, ChunkedKVCache):
        cache.maybe_trim_front()  # as Llama 4 does
    keys = mx.broadcast_to(marks[:, None, :, None], (*marks.shape[:1], 1, marks.shape[1], WIDTH))
    held, _ = cache.update_and_fetch(keys.astype(mx.float32), keys.astype(mx.float32))
    if not isinstance(held, mx.array):
        held = mx.dequantize(*held, group_size=cache.group_size, bits=cache.kv_bits)
    return [mx.sort(held[:, 0, :, 0], axis=-1)]


def filled(kind: str, row: int) -> Any:
    cache, position = KINDS[kind](), 0
    for size in CHUNKS[row]:
        feed(cache, mx.arange(position, position + size)[None] + 100 * row)
        position += size
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_tokens_as_others_join_and_leave(kind: str) -> None:
    alone = [filled(kind, row) for row in range(3)]
    joined = even.extend(even.merge([[filled(kind, 0)], [filled(kind, 1)]]), [filled(kind, 2)])
    for step, rows in enumerate(([0, 1, 2], [0, 2], [2])):
        if step:
            before = [0, 1, 2] if step == 1 else [0, 2]
            joined = even.keep_rows(joined, [before.index(row) for row in rows])
        marks = [50 + step + 100 * row for row in rows]
        together = feed(joined[0], mx.array(marks)[:, None])
        expected = [
            feed(alone[row], mx.array([[mark]])) for row, mark in zip(rows, marks, strict=True)
        ]
        for part, held in enumerate(together):
            assert mx.array_equal(held, mx.concatenate([one[part] for one in expected]))


def test_states_are_kept_by_row() -> None:
    caches = [ArraysCache(2) for _ in range(3)]
    for row, cache in enumerate(caches):
        cache[0] = mx.full((1, 3), row)
    [joined] = even.merge([[cache] for cache in caches])
    [kept] = even.keep_rows([joined], [0, 2])
    assert kept[0].tolist() == [[0, 0, 0], [2, 2, 2]]
    assert kept[1] is None


def test_caches_that_differ_in_length_are_not_joined() -> None:
    short, long = KVCache(), KVCache()
    feed(short, mx.arange(3)[None])
    feed(long, mx.arange(4)[None])
    with pytest.raises(ValueError, match="equal length"):
        even.merge([[short], [long]])
    with pytest.raises(ValueError, match="equal length"):
        even.merge([[short], [KVCache()]])


def test_room_reserved_for_one_prompt_is_not_kept_for_all() -> None:
    cache = [KVCache()]
    kv.reserve(cache, 5000, 40)
    feed(cache[0], mx.arange(40)[None])
    [joined] = even.merge([cache, [filled("whole", 1)]])
    feed(joined, mx.array([[1], [2]]))
    assert joined.keys.shape[2] <= 40 + KVCache.step
