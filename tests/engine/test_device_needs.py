"""What MLX needs to be told, or asked, on devices other than a CPU."""

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.quantized import QuantizedLinear

from mlx_server.engine.cache import block_file
from mlx_server.engine.cache.block_file import DTYPES, to_host
from mlx_server.engine.run import cuda

SHOW = """
import os, sys
from mlx_server.engine import worker
from mlx_server.engine.run import cuda
assert "mlx.core" not in sys.modules
cuda.keep_prepared_graphs()
print(*(os.environ[name] for name in cuda.ENVIRONMENT))
"""


@pytest.mark.parametrize("own", [{}, {"MLX_CUDA_SDPA_CACHE_SIZE": "77"}])
def test_cuda_keeps_more_prepared_graphs_unless_the_user_says_otherwise(
    own: dict[str, str],
) -> None:
    inherited = {k: v for k, v in os.environ.items() if k not in cuda.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=inherited | own,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == list((cuda.ENVIRONMENT | own).values())


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
