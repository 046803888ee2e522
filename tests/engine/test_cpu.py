"""The CPU device's own forms of attention, SwiGLU and exp, against the originals."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations as originals
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cpu import activations, attention
from mlx_server.engine.run import patches

ATTENTION = mx.fast.scaled_dot_product_attention
SWIGLU = originals.swiglu
LEFT_PADDING = [0, 7, 3]

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="replaces functions on a CPU device only"
)


@pytest.fixture
def sped_up() -> Iterator[None]:
    patches.use_cpu_kernels()
    yield
    mx.fast.scaled_dot_product_attention = ATTENTION
    originals.swiglu = SWIGLU


def draw(*shape: int, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, scale=scale, key=mx.random.key(sum(shape)))


def qkv(
    batch: int, tokens: int, keys: int, heads: int, kv_heads: int, dim: int = 16
) -> tuple[mx.array, mx.array, mx.array]:
    """Laid out as in a model: queries transposed, keys and values a part of a longer cache."""
    q = draw(batch, tokens, heads, dim, scale=3).transpose(0, 2, 1, 3)
    k = draw(batch, kv_heads, keys + 9, dim, scale=3)[:, :, :keys]
    v = draw(batch, kv_heads, keys + 9, 2 * dim)[:, :, :keys]
    return q, k, v


def assert_close(found: mx.array, expected: mx.array) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("tile", [64, attention.TILE])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 50), (2, 2), (33, 33), (40, 91)])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_attention_is_that_of_mlx(
    monkeypatch: pytest.MonkeyPatch,
    mask: str | None,
    tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    tile: int,
) -> None:
    monkeypatch.setattr(attention, "TILE", tile)
    q, k, v = qkv(2, tokens, keys, heads, kv_heads)

    found = attention.attention(q, k, v, scale=0.25, mask=mask)

    assert_close(found, ATTENTION(q, k, v, scale=0.25, mask=mask))


@pytest.mark.parametrize("tile", [64, attention.TILE])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("form", ["rows", "shared", "heads", "additive", "infinite"])
def test_attention_takes_every_form_of_mask(
    monkeypatch: pytest.MonkeyPatch, form: str, tokens: int, tile: int
) -> None:
    monkeypatch.setattr(attention, "TILE", tile)
    q, k, v = qkv(3, tokens, 20 + tokens, 6, 2)
    padded = create_causal_mask(tokens, 20, left_padding=mx.array(LEFT_PADDING))
    masks = {
        "rows": padded,
        "shared": create_causal_mask(tokens, 20, window_size=11),
        "heads": padded & (draw(3, 6, tokens, 20 + tokens) > -1),
        "additive": draw(3, 1, tokens, 20 + tokens, scale=5),
        "infinite": mx.where(padded, 0.0, -mx.inf),
    }

    found = attention.attention(q, k, v, scale=0.25, mask=masks[form])

    assert_close(found, ATTENTION(q, k, v, scale=0.25, mask=masks[form]))


@pytest.mark.parametrize("tokens", [1, 8])
def test_attention_over_many_keys_and_large_scores_is_that_of_mlx(tokens: int) -> None:
    q, k, v = qkv(4, tokens, 3000, 6, 2)
    mask = create_causal_mask(tokens, 3000 - tokens, left_padding=mx.array([0, 1, 2999, 500]))

    for scale in (0.1, 40.0):
        found = attention.attention(q, k, v, scale=scale, mask=mask)
        assert_close(found, ATTENTION(q, k, v, scale=scale, mask=mask))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_row_without_keys_does_not_become_nan(tokens: int) -> None:
    q, k, v = qkv(2, tokens, 12, 4, 2)
    mask = mx.array([True, False]).reshape(2, 1, 1, 1) & mx.ones((2, 1, tokens, 12), mx.bool_)

    found = attention.attention(q, k, v, scale=0.25, mask=mask)

    assert_close(found, ATTENTION(q, k, v, scale=0.25, mask=mask))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_dtypes_and_sinks_are_left_to_mlx(dtype: mx.Dtype) -> None:
    q, k, v = (array.astype(dtype) for array in qkv(2, 5, 9, 4, 2))
    sinks = draw(4).astype(dtype)
    gate, x = q[..., :8], k[:, :1, :5, :8]

    found = attention.attention(q, k, v, scale=0.25, mask="causal", sinks=sinks)

    assert mx.array_equal(found, ATTENTION(q, k, v, scale=0.25, mask="causal", sinks=sinks))
    assert mx.array_equal(activations.swiglu(gate, x), SWIGLU(gate, x))


def test_attention_leaves_its_arguments_as_they_were() -> None:
    arguments = qkv(1, 40, 40, 4, 2)
    before = [np.array(array) for array in arguments]

    mx.eval(attention.attention(*arguments, scale=1.0, mask="causal"))

    for array, copy in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(np.array(array), copy)


@pytest.mark.parametrize(
    "shape", [(1, 1, 40), (16, 1, 2048), (37, 1, 256), (1, 300, 128), (4, 5, 2, 1, 64)]
)
def test_swiglu_is_that_of_mlx_lm(shape: tuple[int, ...]) -> None:
    gate, x = draw(*shape, scale=30), draw(*shape[::-1]).reshape(shape)
    before = np.array(gate)

    assert_close(activations.swiglu(gate, x), SWIGLU(gate, x))

    np.testing.assert_array_equal(np.array(gate), before)


def test_swiglu_of_extreme_values_is_finite() -> None:
    gate = mx.array([-1e30, -1e4, -90, 0, 90, 1e4, 1e30]).reshape(1, 7, 1)
    for width in (1, activations.EAGER):  # lazy and eager
        wide = mx.broadcast_to(gate, (1, 7, width))
        found = np.array(activations.swiglu(wide, mx.ones_like(wide)))[0, :, 0]
        np.testing.assert_allclose(found, [0, 0, 0, 0, 90, 1e4, 1e30], rtol=1e-6, atol=1e-4)


def test_exp_is_exact_to_a_few_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-87, 88, 200_001), [0, -1e-30, 1e-30]]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))

    found = np.array(activations.exp(mx.array(x)), dtype=np.float64)

    error = np.abs(found / expected - 1)
    assert np.all(error <= 3e-7 + 1e-7 * np.abs(x))


def test_exp_of_what_is_too_small_is_next_to_nothing() -> None:
    found = np.array(activations.exp(mx.array([-88.0, -100.0, -1e30, -mx.inf])))
    assert np.all((found >= 0) & (found < 2e-38))


def test_a_model_says_the_same_greedy_tokens(sped_up: None, tiny_model: Path) -> None:
    prompt = mx.array([[7, 8, 9] * 40, [30, 31, 32] * 40])
    fast = _greedy(tiny_model, prompt)
    assert importlib.import_module("mlx_lm.models.llama").swiglu is activations.swiglu
    mx.fast.scaled_dot_product_attention = ATTENTION
    originals.swiglu = SWIGLU

    assert fast == _greedy(tiny_model, prompt)


def test_no_model_is_imported_before_its_swiglu_is_replaced() -> None:
    show = (
        "import sys\n"
        "import mlx_server.engine.run.backend\n"
        "print(*(name for name, one in sys.modules.items() if hasattr(one, 'swiglu')))"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _greedy(path: Path, prompt: mx.array) -> list[list[int]]:
    """40 tokens for each row, with the model's module imported anew."""
    sys.modules.pop("mlx_lm.models.llama", None)
    model, _ = load_model(path)
    cache = make_prompt_cache(model)
    cache = [layer.merge([layer, make_prompt_cache(model)[i]]) for i, layer in enumerate(cache)]
    tokens = mx.argmax(model(prompt, cache=cache)[:, -1], axis=-1)
    said = [tokens]
    for _ in range(39):
        said.append(mx.argmax(model(said[-1][:, None], cache=cache)[:, -1], axis=-1))
    return cast(list[list[int]], mx.stack(said, axis=1).tolist())
