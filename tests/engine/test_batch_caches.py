"""KV caches of a batch: against mlx-lm's own, and what they spare a device."""

import io
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
from mlx_lm.utils import load_model

from mlx_server.engine.cache import rows
from mlx_server.engine.cache.quant import QuantizedKVCache
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import LoadOptions
from mlx_server.engine.run import kv
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.mixed import Part
from tests.support.tiny import build_recurrent_model, build_tiny_model

HEADS, WIDTH = 2, 32
WINDOW = 12
KINDS = {
    "plain": KVCache,
    "window": lambda: RotatingKVCache(max_size=WINDOW),
    "quantized": lambda: QuantizedKVCache(8),
}
BOTH = pytest.mark.parametrize("device", ["cpu", "metal"], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the caches take MLX's device for."""
    for module in (rows, kv):
        monkeypatch.setattr(module, "device_name", lambda: request.param)
    return str(request.param)


def drawn(rng: random.Random, rows: int, tokens: int) -> mx.array:
    key = mx.random.key(rng.randrange(1 << 30))
    return mx.random.normal((rows, HEADS, tokens, WIDTH), key=key)


def sequence_of(kind: str, keys: mx.array) -> Any:
    cache = KINDS[kind]()
    if keys.shape[2]:
        cache.update_and_fetch(keys, 2 * keys)
    return cache


def attended(cache: Any, new: mx.array) -> mx.array:
    """What rows (rows, heads, tokens, width) get by attention to a cache."""
    mask = cache.make_mask(new.shape[2], return_array=False, window_size=None)
    keys, values = cache.update_and_fetch(new, 2 * new)
    if isinstance(keys, tuple):
        size, bits = cache.group_size, cache.kv_bits
        keys, values = mx.dequantize(*keys, size, bits), mx.dequantize(*values, size, bits)
    out: mx.array = mx.fast.scaled_dot_product_attention(new, keys, values, scale=0.2, mask=mask)
    return out


def alone(kind: str, known: list[mx.array], new: mx.array) -> mx.array:
    """The same for one row by mlx-lm's cache of a sequence; `known` came in these chunks."""
    cache = KINDS[kind]()
    for keys in known:
        cache.update_and_fetch(keys, 2 * keys)
    return attended(cache, new)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_and_go_attend_as_each_sequence_alone(device: str, kind: str) -> None:
    rng = random.Random(3)
    batch: Any = None
    known: list[list[mx.array]] = []
    for _ in range(60):
        action = rng.choice(["join", "leave", "step", "step", "step"])
        if batch is None or (action == "join" and len(known) < 5):
            new = [[drawn(rng, 1, n)] for n in rng.choices([0, 1, 7, 11, 30], k=rng.choice([1, 3]))]
            joined = rows.merge([sequence_of(kind, keys) for [keys] in new])
            if batch is None:
                batch = joined
            else:
                batch.extend(joined)
            known += new
        elif action == "leave" and len(known) > 1:
            kept = sorted(rng.sample(range(len(known)), len(known) - 1))
            batch.filter(kept)
            known = [known[row] for row in kept]
        else:
            tokens = drawn(rng, len(known), 1)
            found = attended(batch, tokens)
            for row, chunks in enumerate(known):
                own = tokens[row : row + 1]
                full = [chunk for chunk in chunks if chunk.shape[2]]
                assert mx.allclose(found[row], alone(kind, full, own)[0], atol=1e-4)
                chunks.append(own)
        if kind != "window":
            assert batch.offset.tolist() == [sum(c.shape[2] for c in row) for row in known]


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_padded_on_the_right_attend_as_each_alone(device: str, kind: str) -> None:
    rng = random.Random(4)
    lengths = [9, 4, 6]
    prompts = drawn(rng, 3, max(lengths))
    cache = [rows.merge([KINDS[kind]() for _ in lengths])]
    kv.pad_right(cache, lengths)
    attended(cache[0], prompts)
    kv.unpad(cache)
    step = drawn(rng, 3, 1)
    found = attended(cache[0], step)
    for row, length in enumerate(lengths):
        known = prompts[row : row + 1, :, :length]
        expected = alone(kind, [known], step[row : row + 1])
        assert mx.allclose(found[row], expected[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_padding_has_no_mask(kind: str) -> None:
    rng = random.Random(5)

    def merged(*lengths: int) -> Any:
        return rows.merge([sequence_of(kind, drawn(rng, 1, n)) for n in lengths])

    assert merged(5).make_mask(1) is None
    assert merged(5, 5).make_mask(1) is None
    assert isinstance(merged(5, 4).make_mask(1), mx.array)
    assert merged(5, 5).make_mask(3) == "causal"
    assert isinstance(merged(5, 5).make_mask(3, return_array=True), mx.array)
    batch = merged(9, 4, 9)
    batch.filter([0, 2])
    assert batch.make_mask(1) is None
    batch = merged(5)
    batch.extend(merged(3))
    assert isinstance(batch.make_mask(1), mx.array)
    assert isinstance(merged(9, 9).make_mask(1, window_size=4), mx.array)


def test_a_window_that_all_rows_fill_has_no_mask() -> None:
    rng = random.Random(6)
    batch = rows.merge([sequence_of("window", drawn(rng, 1, n)) for n in (30, 4)])
    masks = []
    for _ in range(WINDOW):
        masks.append(batch.make_mask(1))
        attended(batch, drawn(rng, 2, 1))
    assert isinstance(masks[0], mx.array)
    assert masks[-1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_leaves_makes_nobody_wait(kind: str) -> None:
    rng = random.Random(7)
    cache = [rows.merge([sequence_of(kind, drawn(rng, 1, n)) for n in (9, 5, 7)]) for _ in range(3)]
    mx.eval([layer.state for layer in cache])
    pending = []
    for layer in cache:
        attended(layer, drawn(rng, 3, 1))
        pending.append(layer.keys[0] if isinstance(layer.keys, tuple) else layer.keys)
    before = nodes(pending)
    kv.keep_rows(cache, [1, 2])
    assert nodes(pending) == before > 0


@pytest.mark.parametrize("device", ["metal", "cuda"], indirect=True)
def test_off_a_cpu_all_layers_hold_the_same_multiple_of_256_tokens(device: str) -> None:
    rng = random.Random(8)
    cache: list[Any] = [KVCache() for _ in range(3)]
    for chunk, left in ((100, 700), (300, 600), (300, 300)):
        kv.reserve(cache, left, chunk)
        for layer in cache:
            layer.update_and_fetch(*[drawn(rng, 1, chunk)] * 2)
            assert layer.keys.shape[2] == layer.values.shape[2] == 768
    resumed: list[Any] = [sequence_of("plain", drawn(rng, 1, 96)[:, :, :96]) for _ in range(3)]
    for layer in resumed:
        layer.keys, layer.values = layer.keys[:, :, :96], layer.values[:, :, :96]
    kv.reserve(resumed, 200, 50)
    for layer in resumed:
        layer.update_and_fetch(*[drawn(rng, 1, 50)] * 2)
        assert layer.keys.shape[2] == 512
    batch = kv.merge([cache, resumed])
    for _ in range(80):
        for layer in batch:
            layer.update_and_fetch(*[drawn(rng, 2, 1)] * 2)
    assert {layer.keys.shape[2] for layer in batch} == {1024}
    batch = kv.keep_rows(batch, [1])
    assert {layer.keys.shape[2] for layer in batch} == {512}


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_on_a_cpu_layers_grow_in_turn(device: str) -> None:
    rng = random.Random(9)
    cache: list[Any] = [KVCache() for _ in range(3)]
    kv.reserve(cache, 700, 100)
    for layer in cache:
        layer.update_and_fetch(*[drawn(rng, 1, 100)] * 2)
    assert len({layer.keys.shape[2] for layer in cache}) == 3


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_mixed_steps_leave_no_chain_behind(tmp_path: Path, family: str) -> None:
    path = build_tiny_model(tmp_path / family, family)
    backend = Backend(path, LoadOptions(), DeviceMemory("50%", None))
    begun = [backend.new_cache() for _ in range(3)]
    for length, cache in enumerate(begun, 3):
        backend.prefill(mx.arange(length)[None], cache)
    groups = [kv.merge(begun[:2]), kv.merge(begun[2:])]
    left = []
    for _ in range(12):
        parts = [Part(mx.array([[3], [4]]), groups[0]), Part(mx.array([[5]]), groups[1])]
        mx.eval(backend.step(parts, 3).logits)
        left.append(unevaluated(groups))
    assert left[-1] <= left[2]


def test_steps_of_a_recurrent_model_leave_no_chain_behind(tmp_path: Path) -> None:
    model, _ = load_model(build_recurrent_model(tmp_path / "recurrent"))
    cache = kv.merge([list(mlx_lm.make_prompt_cache(model)) for _ in range(2)])
    states = [leaf for leaf in kv.leaves(cache) if isinstance(leaf, ArraysCache)]
    assert any(state.left_padding is not None for state in states), "nothing that could chain"
    left = []
    for _ in range(12):
        mx.eval(model(mx.array([[3], [4]]), cache=cache), kv.loose_ends(cache))
        left.append(unevaluated([cache]))
    assert left[-1] <= left[2]


def unevaluated(groups: list[Any]) -> int:
    """Operations that everything caches hold still waits for."""
    arrays: list[mx.array] = []
    for cache in groups:
        for leaf in kv.leaves(cache):
            names = ("offset", "left_padding", "lengths", "keys", "values", "cache")
            for value in (getattr(leaf, name, None) for name in names):
                many = value if isinstance(value, list | tuple) else [value]
                arrays += [one for one in many if isinstance(one, mx.array)]
    return nodes(arrays)


def nodes(arrays: list[mx.array]) -> int:
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")
