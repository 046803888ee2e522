"""Quantized KV caches against plain ones, and rows of a batch against each sequence alone."""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import _get_classes, load_model
from pydantic import ValidationError

from mlx_server.config import Settings
from mlx_server.engine.cache.quant import (
    BatchQuantizedKVCache,
    CannotQuantize,
    QuantizedKVCache,
    check_support,
    group_size_of,
    quantize_cache,
)
from mlx_server.engine.memory import device_name
from mlx_server.engine.run import kv
from tests.support.tiny import build_tiny_model

READS_PACKED = device_name() != "cuda"
TOLERANCE = {8: 0.06, 4: 0.6}
"""How far logits may be from those of a plain cache, as a share of the logits' own norm. Random
weights make for sharp attention: a trained model is some ten times closer."""
ROUNDING = 1e-4 if READS_PACKED else 1e-3
"""On CUDA the shape of a batch decides which kernels run, and a number between two quantized ones
may then become the other."""
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34], [40]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny(tmp_path_factory.mktemp("models"), head_dim=64)


def tiny(folder: Path, head_dim: int, family: str = "llama") -> Any:
    """A model of two layers with four heads of `head_dim` numbers, two of them for keys."""
    path = build_tiny_model(folder / f"{family}-{head_dim}", family, hidden=4 * head_dim)
    model, _ = load_model(path)
    return model


def made(model_type: str, **config: Any) -> Any:
    """A model straight from mlx-lm, with random weights."""
    model_class, arguments = _get_classes({"model_type": model_type})
    model = model_class(arguments.from_dict({"model_type": model_type, **config}))
    mx.eval(model.parameters())
    return model


def new_cache(model: Any, bits: int) -> list[Any]:
    return quantize_cache(make_prompt_cache(model), bits)


def run(model: Any, cache: list[Any], rows: list[list[int]]) -> mx.array:
    """Logits (rows, vocab) after the last token of each of `rows`, all of one length."""
    logits: mx.array = model(mx.array(rows), cache=cache)[:, -1]
    mx.eval(logits, [layer.state for layer in cache])
    return logits


def filled(model: Any, bits: int, tokens: list[int]) -> list[Any]:
    """A cache of one sequence that holds all of `tokens` but the last."""
    cache = new_cache(model, bits)
    if tokens[:-1]:
        run(model, cache, [tokens[:-1]])
    return cache


def alone(model: Any, bits: int, tokens: list[int], steps: int = 1) -> mx.array:
    """Logits (steps, vocab) of decoding the last `steps` of `tokens` after all before."""
    cache = filled(model, bits, tokens[: len(tokens) - steps + 1])
    return mx.concatenate([run(model, cache, [[t]]) for t in tokens[len(tokens) - steps :]])


def distance(left: mx.array, right: mx.array) -> float:
    return cast(float, (mx.linalg.norm(left - right) / mx.linalg.norm(right)).item())


def assert_same(left: mx.array, right: mx.array) -> None:
    assert distance(left, right) < ROUNDING


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_logits_are_close_to_those_of_a_plain_cache(
    tmp_path: Path, bits: int, head_dim: int
) -> None:
    model = tiny(tmp_path, head_dim)
    tokens = list(range(10, 50))
    plain = make_prompt_cache(model)
    run(model, plain, [tokens[:-1]])
    expected = run(model, plain, [tokens[-1:]])
    found = alone(model, bits, tokens)
    assert 1e-5 < distance(found, expected) < TOLERANCE[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_merged_batch_come_out_as_each_sequence_alone(model: Any, bits: int) -> None:
    cache = kv.merge([filled(model, bits, prompt) for prompt in PROMPTS])
    following = [[50], [60], [70], [80]]
    first = run(model, cache, [prompt[-1:] for prompt in PROMPTS])
    second = run(model, cache, following)
    for row, prompt in enumerate(PROMPTS):
        expected = alone(model, bits, prompt + following[row], steps=2)
        assert_same(mx.stack([first[row], second[row]]), expected)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_rows_that_join_and_leave_a_batch_come_out_as_each_alone(
    tmp_path: Path, head_dim: int
) -> None:
    model = tiny(tmp_path, head_dim)
    batch = kv.merge([filled(model, 8, prompt) for prompt in PROMPTS[:2]])
    run(model, batch, [prompt[-1:] for prompt in PROMPTS[:2]])
    batch = kv.extend(batch, kv.merge([filled(model, 8, p) for p in PROMPTS[2:]]))
    # Row 0 was the longest, so that what it leaves is shifted to the left.
    batch = kv.keep_rows(batch, [2, 1])
    logits = run(model, batch, [PROMPTS[2][-1:], [90]])
    assert_same(logits[:1], alone(model, 8, PROMPTS[2]))
    assert_same(logits[1:], alone(model, 8, [*PROMPTS[1], 90]))
    assert [int(offset) for offset in batch[0].offset.tolist()] == [5, 4]


def test_a_batch_of_empty_caches_can_be_extended_and_extend(model: Any) -> None:
    one_token = [[40], [41]]
    for order in ([one_token, PROMPTS[:2]], [PROMPTS[:2], one_token], [one_token, one_token]):
        parts = [kv.merge([filled(model, 8, prompt) for prompt in part]) for part in order]
        batch = kv.extend(parts[0], parts[1])
        prompts = [*order[0], *order[1]]
        logits = run(model, batch, [prompt[-1:] for prompt in prompts])
        for row, prompt in enumerate(prompts):
            assert_same(logits[row], alone(model, 8, prompt)[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_prompts_padded_on_the_right_come_out_as_each_alone(model: Any, bits: int) -> None:
    lengths = [len(prompt) - 1 for prompt in PROMPTS]
    padded = [prompt[:-1] + [0] * (max(lengths) + 1 - len(prompt)) for prompt in PROMPTS]
    cache = kv.merge([new_cache(model, bits) for _ in PROMPTS])
    kv.pad_right(cache, lengths)
    run(model, cache, padded)
    kv.unpad(cache)
    logits = run(model, cache, [prompt[-1:] for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        assert_same(logits[row], alone(model, bits, prompt)[0])
    assert cache[0].left_padding.tolist() == [max(lengths) - length for length in lengths]


def test_a_prompt_in_chunks_and_a_trimmed_cache_give_what_the_whole_prompt_gives(
    model: Any,
) -> None:
    tokens = list(range(3, 303))  # grows past its first 256 tokens
    cache = new_cache(model, 8)
    for start in range(0, 299, 100):
        run(model, cache, [tokens[start : min(start + 100, 299)]])
    expected = alone(model, 8, tokens)
    assert_same(run(model, cache, [tokens[-1:]]), expected)
    assert [layer.trim(1) for layer in cache] == [1, 1]
    assert_same(run(model, cache, [tokens[-1:]]), expected)
    batch = kv.merge([cache])
    assert [layer.trim(1) for layer in batch] == [1, 1]
    assert_same(run(model, batch, [tokens[-1:]]), expected)


@pytest.mark.parametrize(("bits", "share"), [(8, (8 + 1) / 32), (4, (4 + 1) / 32)])
def test_memory_is_the_bits_of_a_number_and_its_share_of_scale_and_bias(
    model: Any, bits: int, share: float
) -> None:
    def sizes(tokens: int) -> tuple[int, int]:
        caches = make_prompt_cache(model), new_cache(model, bits)
        for cache in caches:
            run(model, cache, [list(range(tokens))])
        return kv.cache_bytes(caches[0]), kv.cache_bytes(caches[1])

    for tokens in (1, 256, 257):
        plain, quantized = sizes(tokens)
        assert quantized == plain * share
    plain_one = 2 * 2 * 2 * 64 * 4  # layers, keys and values, heads, head_dim, bytes
    assert sizes(1)[1] == 256 * plain_one * share
    assert sizes(257)[1] == 512 * plain_one * share


def test_half_precision_stays_half_precision(model: Any) -> None:
    cache = QuantizedKVCache(8)
    part = mx.random.normal((1, 2, 3, 64)).astype(mx.bfloat16)
    keys, values = cache.update_and_fetch(part, part)
    assert keys.dtype == values.dtype == mx.bfloat16
    assert cache.nbytes == 256 * 2 * 2 * (64 + 2 * 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("head_dim", "packed"), [(64, True), (128, True), (256, True), (32, False), (96, False)]
)
def test_attention_is_that_over_the_dequantized_numbers_with_padding_and_shared_heads(
    bits: int, head_dim: int, packed: bool
) -> None:
    """Only decode steps, of heads for which every kernel is right, read packed numbers."""
    mx.random.seed(3)
    cache = BatchQuantizedKVCache(bits, [2, 0])
    plain = KVCache()
    for tokens in (5, 1, 1):
        keys, values = (mx.random.normal((2, 2, tokens, head_dim)) for _ in range(2))
        queries = mx.random.normal((2, 4, tokens, head_dim))
        mask = cache.make_mask(tokens)
        exact = plain.update_and_fetch(rounded(keys, bits), rounded(values, bits))
        expected = scaled_dot_product_attention(queries, *exact, plain, scale=0.1, mask=mask)
        held = cache.update_and_fetch(keys, values)
        assert hasattr(cache, "bits") == (READS_PACKED and packed and tokens == 1)
        found = scaled_dot_product_attention(queries, *held, cache, scale=0.1, mask=mask)
        # The first queries of row 0 are padding and may be anything.
        assert_same(found[:, :, -1], expected[:, :, -1])


def rounded(array: mx.array, bits: int) -> mx.array:
    """`array` as quantization leaves it."""
    size = group_size_of(array.shape[-1])
    return mx.dequantize(*mx.quantize(array, size, bits), size, bits)


def test_windows_and_recurrent_states_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny(tmp_path, 64, "gemma")
    kinds = {type(layer) for layer in new_cache(model, 8)}
    assert kinds == {QuantizedKVCache, RotatingKVCache}
    assert check_support(model, 8) == 1


def test_caches_in_a_list_are_quantized_too() -> None:
    (layer,) = quantize_cache([CacheList(RotatingKVCache(8), KVCache())], 4)
    assert [type(part) for part in layer.caches] == [RotatingKVCache, QuantizedKVCache]


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "phi", "generic"])
def test_common_families_are_supported(tmp_path: Path, family: str) -> None:
    assert check_support(tiny(tmp_path, 32, family), 8) == 2


def test_a_head_that_no_group_size_divides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotQuantize, match="80"):
        check_support(tiny(tmp_path, 80), 8)


@pytest.mark.skipif(not READS_PACKED, reason="served from dequantized numbers on CUDA")
def test_attention_with_sinks_is_refused() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 64, "vocab_size": 64}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16}
    model = made("gpt_oss", **sizes, **experts, **heads)
    with pytest.raises(CannotQuantize, match="sinks"):
        check_support(model, 8)


@pytest.mark.skipif(not READS_PACKED, reason="served from dequantized numbers on CUDA")
def test_latent_attention_is_refused() -> None:
    model = made(
        "deepseek_v3",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=None,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=64,
    )
    with pytest.raises(CannotQuantize, match="quantized KV cache"):
        check_support(model, 8)


def test_the_setting_reaches_the_engine_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_SERVER_KV_BITS", "8")
    assert Settings.load().load_options("any").kv_bits == 8
    monkeypatch.setenv("MLX_SERVER_KV_BITS", "5")
    with pytest.raises(ValidationError, match="kv_bits"):
        Settings.load()
