"""What only CUDA needs. MLX is imported late: `keep_prepared_graphs` comes before."""

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

ENVIRONMENT = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": "256",
    "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}
"""MLX prepares a graph for each shape, and keeps 400 of passes and 256 of attention unless told
otherwise. Each new length of a prompt is a shape, and MLX raises once it has missed twice as many
graphs in its life as it may keep. Measured on an H100: one of a pass takes some 4 MB of the device
(with 1024 of them, an engine soon held 4 GB beside its arrays); one of attention takes 1.4 MB of
the host, and 40 ms to make."""

FEWEST_ROWS, AMPERE = 8, 8
MATRIX_BITS, MATRIX_TILE = (4, 8), 128
WORTH_ZEROS = 3 << 24
"""Weights read more often than once, from which padding pays. Measured on an H100: a product of 4
rows with 14336 x 4096 weights of 4 bits takes 136 us, padded to 8 rows 47, with 4096 x 4096 as long
either way."""


def keep_prepared_graphs() -> None:
    """For before MLX is imported, which reads its environment once; what the user says stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def by_rows(
    quantized_matmul: Callable[..., "mx.array"], fewest: int = 1
) -> Callable[..., "mx.array"]:
    """`mx.quantized_matmul` with all rows of `x` in one matrix.

    On CUDA (rows, 1, width) are as many products, each of which reads the weights. So are fewer
    rows than `fewest`: where that costs more than zeros behind them, they are made so many.
    """
    import mlx.core as mx

    @wraps(quantized_matmul)
    def product(x: mx.array, w: mx.array, *arguments: Any, **options: Any) -> mx.array:
        if w.ndim != 2 or x.ndim < 2:
            return quantized_matmul(x, w, *arguments, **options)
        rows = x.size // x.shape[-1]
        lacking = fewest - rows if 1 < rows < fewest and _is_worth_zeros(x, w, options) else 0
        if x.shape[-2] == rows and not lacking:
            return quantized_matmul(x, w, *arguments, **options)
        flat = x.reshape(rows, -1)
        if lacking:
            flat = mx.pad(flat, [(0, lacking), (0, 0)])
        out = quantized_matmul(flat, w, *arguments, **options)
        return out[:rows].reshape(*x.shape[:-1], -1)

    return product


def fewest_rows() -> int:
    """Rows from which MLX reads quantized weights once: from Ampere on it has kernels for that."""
    import mlx.core as mx

    return FEWEST_ROWS if int(mx.device_info()["compute_capability_major"]) >= AMPERE else 1


def _is_worth_zeros(x: "mx.array", w: "mx.array", options: dict[str, Any]) -> bool:
    """Whether MLX has those kernels for this product, and its rows take long enough one by one."""
    import mlx.core as mx

    outputs, width = w.shape[0], x.shape[-1]
    rows = x.size // width
    return (
        bool(options.get("transpose", True))
        and options.get("bits") in MATRIX_BITS
        and x.dtype in (mx.float16, mx.bfloat16)
        and outputs % MATRIX_TILE == 0
        and (rows - 1) * outputs * width >= WORTH_ZEROS
    )
