"""What a model will take, told from its files' headers, against what it then takes."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import (
    dequantize_model,
    load_model,
    quantize_model,
    save_model,
)

from mlx_server.dimensions import context_length, head_weights
from mlx_server.engine.cache.quant import quantize_cache
from mlx_server.engine.run.kv import KvCost
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.pool.footprint import read_footprint
from tests.support.architectures import ARCHITECTURES, model_of, own_config
from tests.support.heads import HEADED, build_headed
from tests.support.tiny import build_tiny_model


def bytes_of(model: Any) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(array.nbytes for array in arrays.values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden=128, context=1000)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_counted_exactly_as_stored_and_dequantized(
    tiny: Path, tmp_path: Path, bits: int
) -> None:
    model, config = load_model(tiny)
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_footprint(tmp_path, False).weights == bytes_of(model)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    assert read_footprint(tmp_path, True).weights == bytes_of(model)


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "phi", "generic", "gemma"])
def test_weights_and_caches_are_never_underestimated(tmp_path: Path, family: str) -> None:
    path = build_tiny_model(tmp_path / family, family, context=3000)
    footprint = read_footprint(path, True)
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    assert footprint.weights == bytes_of(model)
    cache = list(make_prompt_cache(model))
    model(mx.array([[0]]), cache=cache)
    cost = KvCost(cache)
    for tokens in (1, 255, 256, 257, 3000):
        assert footprint.kv(tokens) >= cost.bytes(1, tokens)
    if family != "gemma":  # whose sliding windows make for a smaller cache
        assert footprint.kv(3000) <= 1.01 * cost.bytes(1, 3000)
    assert footprint.context_length == 3000


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architectures_caches_have_room(tmp_path: Path, name: str) -> None:
    config = own_config(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"some.weight": mx.zeros((1,))})
    model = model_of(ARCHITECTURES[name])
    cache = list(make_prompt_cache(model))
    model(mx.array([[0]]), cache=cache)
    cost = KvCost(cache)
    footprint = read_footprint(tmp_path, True)
    assert footprint.context_length == context_length(config)
    assert footprint.kv(0) > 0
    if name != "falcon_h1":  # beside all its caches, states that at this size are not small
        assert footprint.kv(2048) >= cost.bytes(1, 2048)


def test_a_cache_costs_what_it_takes_in_the_rank_with_most() -> None:
    """Of which one has layers with windows, and the other layers that keep all tokens."""
    windows, whole = [RotatingKVCache(max_size=16) for _ in range(3)], [KVCache(), ArraysCache(1)]
    heads = mx.zeros((1, 2, 1, 8))
    for layer in (*windows, whole[0]):
        layer.update_and_fetch(heads, heads)
    whole[1][0] = mx.zeros((1, 4))
    own, other = KvCost(windows), KvCost(whole)
    both = own.or_more([other.own])
    for tokens in (1, 20, 300):
        assert both.bytes(2, tokens) == max(own.bytes(2, tokens), other.bytes(2, tokens))
    assert both.of_block(32) == other.of_block(32) == 32 * 128
    assert both.of_snapshot() == own.of_snapshot() == 3 * 16 * 128
    assert both.longest(1 << 20, 4096) == other.longest(1 << 20, 4096)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_quantized_caches_are_never_underestimated(tmp_path: Path, family: str, bits: int) -> None:
    path = build_tiny_model(tmp_path / family, family, hidden=128)
    footprint = read_footprint(path, True, kv_bits=bits)
    model, _ = load_model(path)
    for tokens in (1, 64, 300):
        cache = quantize_cache(make_prompt_cache(model), bits)
        model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache)
        taken = sum(layer.nbytes for layer in cache)
        assert taken <= footprint.kv(tokens)
    if family == "llama":
        assert taken == 512 * footprint.kv_per_token
    else:  # one of two layers has a window, and is not quantized
        whole = read_footprint(path, True).kv_per_token
        assert footprint.kv_per_token == whole / 2 + whole / 2 * (bits + 2) / 32


NUMBERS_PER_TOKEN = {
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "longcat_flash"), 16 + 8),
    **dict.fromkeys(("bailing_hybrid", "bailing_moe_v3"), 16 + 8),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), 16 + 8 + 2 * 16),
}
"""In the cache of a head, where that is not two heads' keys and values of eight numbers."""


@pytest.mark.parametrize("name", HEADED)
def test_a_models_own_head_is_counted_where_it_is_loaded(tmp_path: Path, name: str) -> None:
    path = build_headed(tmp_path / "with", name)
    without, headed = (read_footprint(path, True, head=head) for head in (False, True))
    weights = mx.load(str(path / "model.safetensors"))
    assert isinstance(weights, dict)
    names = head_weights(json.loads((path / "config.json").read_text()))
    assert names is not None
    own = sum(weight.nbytes for key, weight in weights.items() if names.match(key))
    assert headed.weights == without.weights + own == sum(one.nbytes for one in weights.values())
    assert own > 10_000
    numbers = NUMBERS_PER_TOKEN.get(name, 2 * 2 * 8)
    assert headed.kv_per_token == without.kv_per_token + numbers * 4


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_what_a_head_shares_with_its_model_is_counted_once(tmp_path: Path, name: str) -> None:
    converted = build_headed(tmp_path / "converted", name)
    shipped = build_headed(tmp_path / "shipped", name, raw=True)
    assert (shipped / "model.safetensors").stat().st_size > (
        converted / "model.safetensors"
    ).stat().st_size
    for head in (False, True):
        ours, theirs = (read_footprint(path, True, head=head) for path in (converted, shipped))
        assert ours == theirs


def test_heads_that_cannot_be_quantized_are_counted_whole(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "model", hidden=4 * 80)
    whole = read_footprint(path, True).kv_per_token
    assert read_footprint(path, True, kv_bits=4).kv_per_token == whole


def test_room_to_compute_grows_with_the_batch(tiny: Path) -> None:
    footprint = read_footprint(tiny, True)
    assert footprint.working(1) < footprint.working(64) < 100 * footprint.working(1)


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def widen(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"][0] *= 2


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 1), "truncated"),
        (lambda file: os.truncate(file, 100), "safetensors"),
        (lambda file: os.truncate(file, 3), "safetensors"),
        (lambda file: file.write_bytes(b"\xff" * 64), "implausibly"),
        (lambda file: file.write_bytes(b"version https://git-lfs.example/v1\n" * 3), "implausibly"),
        (lambda file: file.unlink(), "no model"),
        (lambda file: with_header(file, widen), "shape"),
        (lambda file: with_header(file, lambda _: [1]), "no object"),
        (lambda file: with_header(file, lambda _: {"a": 1}), "safetensors"),
        (lambda file: with_header(file, lambda _: {"a": {"shape": ["x"]}}), "safetensors"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, damage: Any, says: str) -> None:
    path = build_tiny_model(tmp_path / "model")
    damage(path / "model.safetensors")
    with pytest.raises(ModelLoadFailed, match=says):
        read_footprint(path, True)


@pytest.mark.parametrize("value", [None, "many", -1, [], {}, [3, "x"]])
def test_odd_values_in_the_config_are_survived(tmp_path: Path, value: object) -> None:
    path = build_tiny_model(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    for name in ("num_hidden_layers", "head_dim", "num_attention_heads", "quantization"):
        (path / "config.json").write_text(json.dumps(config | {name: value}))
        assert read_footprint(path, True).weights > 0
    for name in ("layer_types", "sliding_window_pattern"):
        (path / "config.json").write_text(json.dumps(config | {name: value}))
        assert read_footprint(path, True, kv_bits=8).kv_per_token > 0
