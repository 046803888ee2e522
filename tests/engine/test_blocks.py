"""Layers that a CPU computes in few calls, and attention in place, compute what MLX does."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_server.engine.cache.rows import STEP, BatchKVCache
from mlx_server.engine.cpu.blocks import FEW_ROWS, Block
from mlx_server.engine.memory import DeviceMemory, device_name
from mlx_server.engine.protocol import LoadOptions, Sharing
from mlx_server.engine.run import kv
from mlx_server.engine.run.backend import Backend
from tests.support.architectures import build_architecture
from tests.support.tiny import build_quantized

pytestmark = pytest.mark.skipif(device_name() != "cpu", reason="for CPUs")

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LENGTHS = (3, 40, STEP - 3)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "neighbours": ("llama", {"rope_traditional": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "yarn": (
        "qwen2",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {}),
}


def backend(path: Path, mode: Any) -> Backend:
    return Backend(path, LoadOptions(dequantize=mode), DeviceMemory("4GB", None))


def filled(model: Backend, lengths: tuple[int, ...]) -> list[Any]:
    """A cache of a batch with rows of these lengths."""
    caches = []
    for row, length in enumerate(lengths):
        cache = model.new_cache()
        model.prefill((mx.arange(length)[None] + row) % 50 + 3, cache)
        caches.append(cache)
    return model.caches.merge(caches)


def in_blocks(model: Backend) -> bool:
    return all(isinstance(getattr(layer, "block", None), Block) for layer in model.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_say_what_they_say_in_float32(tmp_path: Path, kind: str) -> None:
    """Beyond where arrays grow, after rows were shortened unequally, and when one has left."""
    name, more = KINDS[kind]
    plain = build_architecture(tmp_path / "plain", name, **SIZES, **more)
    path = build_quantized(plain, tmp_path / "quantized", bits=4, group_size=32)
    found = []
    for mode in ("always", "packed", "both"):
        model = backend(path, mode)
        assert in_blocks(model) == (mode != "always")
        cache, logits = filled(model, LENGTHS), []
        for token in range(8):
            logits.append(model.forward(mx.array([[5 + token], [7], [9]]), cache))
        kv.roll_back(cache, [1, 0, 2])
        logits.append(model.forward(mx.array([[21], [22], [23]]), cache))
        cache = model.caches.keep_rows(cache, [0, 2])
        for token in range(3):
            logits.append(model.forward(mx.array([[31 + token], [32]]), cache))
        many = model.forward(mx.arange(2 * 12).reshape(2, 12) + 3, cache)  # more than few
        logits += [many[:, -1:], model.forward(mx.array([[41], [42]]), cache)]
        found.append([np.array(one) for one in logits])
    scale = max(np.abs(one).max() for one in found[0])
    for each in found[1:]:
        for one, expected in zip(each, found[0], strict=True):
            np.testing.assert_allclose(one, expected, atol=2e-3 * scale)


def test_weights_of_half_precision_are_the_same_in_both_forms(tmp_path: Path) -> None:
    """Else rows would differ by how many of them share a pass, and could share fewer."""
    plain = build_architecture(tmp_path / "plain", "llama", kind=mx.bfloat16, **SIZES)
    path = build_quantized(plain, tmp_path / "quantized", bits=4, group_size=32)
    models = [backend(path, mode) for mode in ("always", "packed", "both")]
    assert {model.batching.prefill for model in models} == {Sharing.ANY}
    token = mx.array([[5]])
    first, *others = [np.array(model.forward(token, filled(model, (40,)))) for model in models]
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-4 * np.abs(first).max())


def test_more_rows_than_few_are_computed_as_ever(tmp_path: Path) -> None:
    plain = build_architecture(tmp_path / "plain", "llama", **SIZES)
    path = build_quantized(plain, tmp_path / "quantized", bits=4, group_size=32)
    tokens = mx.arange(FEW_ROWS + 1)[:, None] + 3
    logits = []
    for mode in ("always", "both"):
        model = backend(path, mode)
        logits.append(np.array(model.forward(tokens, filled(model, (FEW_ROWS + 4,) * len(tokens)))))
    np.testing.assert_array_equal(*logits)


def token(value: float) -> np.ndarray:
    return np.full((1, 2, 4), value, np.float32)


def test_what_is_written_in_place_shows_in_no_other_cache() -> None:
    """Batches that begin as one sequence share its memory, as views of what is held do."""
    alone = KVCache()
    start = mx.ones((1, 2, 3, 4))
    alone.update_and_fetch(start, start)
    batches = [BatchKVCache.merge([alone]) for _ in range(2)]
    block = batches[0].keys[:, :, :3]
    for number in range(1, 3):
        for cache, value in zip(batches, (7 * number, 9 * number), strict=True):
            cache.append(token(value), token(-value))
    [copied] = kv.copy_of_rows([batches[0]], [0])
    copied.append(token(50), token(-50))
    batches[0].append(token(21), token(-21))
    batches[1].append(token(27), token(-27))
    ends = {7: [7, 14, 21], 9: [9, 18, 27]}
    for cache, end in zip((*batches, copied), (*ends.values(), [7, 14, 50]), strict=True):
        keys, values = (np.array(x)[0, 1, : cache.held, 2] for x in (cache.keys, cache.values))
        assert keys.tolist() == [1, 1, 1, *end]
        assert values.tolist() == [1, 1, 1, *(-one for one in end)]
    assert (np.array(block) == 1).all()
    assert alone.offset == 3


def test_mlx_and_writing_in_place_may_take_turns() -> None:
    cache = BatchKVCache([0])
    for turn in range(3 * STEP):
        if turn % 3:
            cache.append(token(turn), token(-turn))
        else:
            one = mx.full((1, 2, 1, 4), float(turn))
            cache.update_and_fetch(one, -one)
    expected = np.arange(3 * STEP, dtype=np.float32)
    assert (np.array(cache.keys)[0, 0, : cache.held, 0] == expected).all()
    assert (np.array(cache.values)[0, 1, : cache.held, 3] == -expected).all()
