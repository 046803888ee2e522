"""What only CUDA needs. MLX is imported late: `keep_prepared_graphs` comes before."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

ENVIRONMENT = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": "1024",
    "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}
"""MLX prepares a graph for each shape, and keeps 400 of passes and 256 of attention unless told
otherwise. Each new length of a prompt is a shape, and MLX raises once it has missed twice as many
graphs in its life as it may keep."""


def keep_prepared_graphs() -> None:
    """For before MLX is imported, which reads its environment once; what the user says stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def by_rows(quantized_matmul: Callable[..., "mx.array"]) -> Callable[..., "mx.array"]:
    """`mx.quantized_matmul` with all rows of `x` in one matrix.

    On CUDA (rows, 1, width) are as many products, each of which reads the weights.
    """
    import mlx.core as mx

    def product(x: mx.array, w: mx.array, *arguments: Any, **options: Any) -> mx.array:
        if w.ndim != 2 or x.ndim < 3 or x.shape[-2] * x.shape[-1] == x.size:
            return quantized_matmul(x, w, *arguments, **options)
        out = quantized_matmul(x.flatten(0, -2), w, *arguments, **options)
        return mx.unflatten(out, 0, x.shape[:-1])

    return product
