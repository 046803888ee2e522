"""What MLX needs to be told, or asked, on devices other than a CPU."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.quantized import QuantizedLinear
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cache import block_file
from mlx_server.engine.cache.block_file import DTYPES, to_host
from mlx_server.engine.cpu import attention
from mlx_server.engine.loading import load
from mlx_server.engine.protocol import Generate, Load, LoadOptions
from mlx_server.engine.run import cuda, scores
from mlx_server.engine.schedule import compiling, scheduler
from tests.support.architectures import build_architecture
from tests.support.tiny import build_tiny_model

SHOW = """
import os, sys
from pathlib import Path
from mlx_server.engine import worker
from mlx_server.engine.run import cuda
assert "mlx.core" not in sys.modules
cuda.keep_prepared(Path("kept"))
print(*(os.environ[name] for name in [*cuda.ENVIRONMENT, "MLX_PTX_CACHE_DIR"]))
"""


@pytest.mark.parametrize("own", [{}, {"MLX_CUDA_SDPA_CACHE_SIZE": "77"}])
def test_cuda_keeps_graphs_and_kernels_unless_the_user_says_otherwise(
    own: dict[str, str],
) -> None:
    kept = cuda.ENVIRONMENT | {"MLX_PTX_CACHE_DIR": f"kept/{version('mlx')}"}
    inherited = {k: v for k, v in os.environ.items() if k not in kept}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=inherited | own,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == list((kept | own).values())


@pytest.mark.parametrize("shape", [(6, 1, 64), (2, 5, 64), (1, 4, 64), (2, 3, 2, 64), (4, 64)])
def test_on_cuda_weights_are_read_once_for_all_rows(shape: tuple[int, ...]) -> None:
    layer = QuantizedLinear(64, 32, bias=False, group_size=32, bits=4)
    x = mx.random.normal(shape, key=mx.random.key(1))
    seen: list[tuple[int, ...]] = []

    def product(x: mx.array, *arguments: Any, **options: Any) -> mx.array:
        seen.append(x.shape)
        return original(x, *arguments, **options)

    original, expected = mx.quantized_matmul, layer(x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mx, "quantized_matmul", cuda.by_rows(product))
        found = layer(x)
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, atol=1e-5)
    [rows] = seen
    assert rows[-2] == x.size // 64


@pytest.mark.parametrize(
    ("shape", "seen_rows"),
    [((3, 1, 256), 8), ((1, 7, 256), 8), ((2, 256), 8), ((1, 1, 256), 1), ((9, 1, 256), 9)],
)
def test_on_cuda_few_rows_of_large_weights_become_enough_to_read_them_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], seen_rows: int
) -> None:
    monkeypatch.setattr(cuda, "WIDE", 256)
    monkeypatch.setattr(cuda, "WORTH_ZEROS", 256)
    layer = QuantizedLinear(256, 256, bias=False, group_size=64, bits=4)
    layer.set_dtype(mx.bfloat16)
    x = mx.random.normal(shape, key=mx.random.key(1)).astype(mx.bfloat16)
    assert products(layer, x, monkeypatch) == [seen_rows]


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "added", "by head"])
def test_on_cuda_attention_of_few_queries_is_what_it_was(heads: int, rows: int, kind: str) -> None:
    keys_of = mx.random.split(mx.random.key(rows), 4)
    queries, keys, values = (
        mx.random.normal((rows, count, tokens, 16), key=key)
        for count, tokens, key in zip((4, heads, heads), (9, 33, 33), keys_of[:3], strict=True)
    )
    shown = mx.random.uniform(shape=(rows, 4, 9, 33), key=keys_of[3]) > 0.3
    mask = {
        "none": None,
        "causal": "causal",
        "bool": shown[:, :1],
        "added": mx.where(shown[:, :1], 0.0, -1e9),
        "by head": shown,
    }[kind]
    calls: list[int] = []

    def original(*arguments: Any, **options: Any) -> mx.array:
        calls.append(1)
        return mx.fast.scaled_dot_product_attention(*arguments, **options)

    attend = cuda.attention_of_few(original)
    found = attend(queries, keys, values, scale=0.3, mask=mask, sinks=None)
    assert not calls
    expected = original(queries, keys, values, scale=0.3, mask=mask)
    assert mx.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "bits", "kind"),
    [(288, 4, mx.bfloat16), (256, 5, mx.bfloat16), (256, 4, mx.float32), (128, 4, mx.bfloat16)],
    ids=["outputs", "bits", "float32", "narrow"],
)
def test_no_zeros_are_added_where_they_do_not_pay(
    monkeypatch: pytest.MonkeyPatch, outputs: int, bits: int, kind: mx.Dtype
) -> None:
    monkeypatch.setattr(cuda, "WIDE", 256)
    monkeypatch.setattr(cuda, "WORTH_ZEROS", 256)
    layer = QuantizedLinear(256, outputs, bias=False, group_size=64, bits=bits)
    layer.set_dtype(kind)
    x = mx.random.normal((3, 1, 256), key=mx.random.key(1)).astype(kind)
    assert products(layer, x, monkeypatch) == [3]


def products(layer: QuantizedLinear, x: mx.array, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that each product of `layer` with `x` was given; its values must not change."""
    original, expected = mx.quantized_matmul, layer(x)
    seen: list[int] = []

    def product(x: mx.array, *arguments: Any, **options: Any) -> mx.array:
        seen.append(x.size // x.shape[-1])
        return original(x, *arguments, **options)

    monkeypatch.setattr(mx, "quantized_matmul", cuda.by_rows(product, cuda.FEWEST_ROWS))
    found = layer(x)
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, rtol=0.02, atol=0.02)
    return seen


def test_on_cuda_a_model_is_loaded_with_what_requests_may_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scheduler, "device_name", lambda: "cuda")
    asked: list[Generate] = []
    add = scheduler.Scheduler.add

    def adding(self: scheduler.Scheduler, request: Generate) -> None:
        asked.append(request)
        add(self, request)

    monkeypatch.setattr(scheduler.Scheduler, "add", adding)
    folder = build_tiny_model(tmp_path / "tiny", context=512)
    work, _ = load(Load(str(folder), LoadOptions()))
    assert [len(request.prompt) for request in asked[:-1]] == list(compiling.PROMPTS)
    assert any(request.prompt_logprobs is not None for request in asked)
    assert isinstance(work, scheduler.Scheduler)
    assert not work.busy
    assert work.counts == scheduler.Counts()


def test_what_is_compiled_at_load_fits_the_shortest_context() -> None:
    assert [len(request.prompt) for request in compiling.requests(40)] == [17, 33]


@pytest.mark.parametrize("device", ["cpu", "metal", "cuda"])
def test_the_disk_is_given_a_copy_on_cuda(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(block_file, "device_name", lambda: device)
    rng = np.random.default_rng(1)
    for name, dtype in DTYPES.items():
        if dtype in (mx.bool_, mx.float64):  # no cache holds them
            continue
        drawn = rng.integers(0, 256, (3, 8 * dtype.size), dtype=np.uint8)
        array = mx.array(drawn).view(dtype)
        mx.eval(array)
        own: Any = array
        host = to_host(array)
        assert (host.dtype, host.shape, bytes(host.data)) == (name, (3, 8), drawn.tobytes())
        assert (address(host.data) == address(memoryview(own))) == (device != "cuda")


def address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own attention, as on a device."""
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention._attention)


def pair_bytes(folder: Path) -> int:
    model, _ = load_model(folder)
    before = mx.fast.scaled_dot_product_attention
    found = scores.bytes_per_pair(model, lambda: make_prompt_cache(model))
    assert mx.fast.scaled_dot_product_attention is before
    return found


def test_scores_that_are_written_out_bound_a_chunk(
    asked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny_model(tmp_path / "tiny")
    heads = 4
    found = pair_bytes(folder)
    assert found == scores.COPIES * heads * 4, "MLX has no fused attention on a CPU"
    for position in (0, 1000, 100_000):
        tokens = scores.tokens_within(found, position)
        assert found * tokens * (position + tokens) <= scores.BUDGET
        assert found * (tokens + 1) * (position + tokens + 1) > scores.BUDGET
    monkeypatch.setattr(scores, "_is_fused", lambda *_, **__: True)
    assert pair_bytes(folder) == 0
    assert scores.tokens_within(0, 1 << 20) == scores.BUDGET


def test_scores_that_a_model_makes_itself_bound_a_chunk(
    asked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_is_fused", lambda *_, **__: True)
    folder = build_architecture(tmp_path / "mla", "deepseek_v3")
    assert pair_bytes(folder) == scores.COPIES * 4 * 4
