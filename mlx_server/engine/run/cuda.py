"""What only CUDA needs. MLX is imported late: `keep_prepared` comes before."""

import os
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
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

FEW_QUERIES = 16
"""Of a sequence in one pass, up to which its attention is not left to cuDNN. Measured on an H200: 9
tokens over some 600 in 32 layers take 2.6 ms, and 66 where cuDNN has not had that number yet."""
FEWEST_ROWS, AMPERE = 8, 8
MATRIX_BITS, MATRIX_TILE = (4, 8), 128
WIDE, WORTH_ZEROS = 8192, 24_576
"""Outputs from which padding can pay, since each group of 128 is computed by a multiprocessor of
its own, and outputs computed more often than once from which it does. Measured on an H200, with
weights of 4 bits, in us, row by row and padded: 2, 4 rows of 4096 x 14336 take 93, 163 and 237,
239; of 14336 x 4096 101, 167 and 118, 113; of 49152 x 4096 263, 481 and 173, 157."""


def keep_prepared(kernels: Path | None) -> None:
    """Graphs in memory, and compiled kernels in the folder `kernels`; among temporary files they
    would be gone after a restart of the machine.

    For before MLX is imported, which reads its environment once; what the user says stays.
    """
    environment = dict(ENVIRONMENT)
    if kernels is not None:
        environment["MLX_PTX_CACHE_DIR"] = str(kernels / version("mlx"))
    for name, value in environment.items():
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


def attention_of_few(attention: Callable[..., "mx.array"]) -> Callable[..., "mx.array"]:
    """`mx.fast.scaled_dot_product_attention`, by two products where queries are few.

    MLX prepares cuDNN's attention anew for each number of keys, which takes 40 ms; a pass that
    verifies guesses has another number each time.
    """
    import mlx.core as mx

    def attend(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        **options: Any,
    ) -> mx.array:
        rows, heads, tokens, width = queries.shape
        if not 1 < tokens <= FEW_QUERIES or any(value is not None for value in options.values()):
            return attention(queries, keys, values, scale=scale, mask=mask, **options)
        shared, length = keys.shape[1], keys.shape[2]
        # Heads that share keys are rows of one product.
        grouped = (queries * scale).reshape(rows, shared, heads // shared * tokens, width)
        scores = (grouped @ keys.swapaxes(2, 3)).reshape(rows, shared, -1, tokens, length)
        if isinstance(mask, str):
            mask = mx.arange(length - tokens, length)[:, None] >= mx.arange(length)
        if mask is not None:
            mask = mask if mask.ndim < 4 else _by_group(mask, shared)
            smallest = mx.finfo(scores.dtype).min
            scores = mx.where(mask, scores, smallest) if mask.dtype == mx.bool_ else scores + mask
        weights = mx.softmax(scores, axis=-1, precise=True)
        out = weights.reshape(rows, shared, -1, length) @ values
        return out.reshape(rows, heads, tokens, values.shape[3])

    return attend


def _by_group(mask: "mx.array", shared: int) -> "mx.array":
    """(rows, 1 or heads, tokens, keys) to an axis more, of the heads that share keys."""
    rows, heads, tokens, length = mask.shape
    if heads == 1:
        return mask[:, :, None]
    return mask.reshape(rows, shared, heads // shared, tokens, length)


def fewest_rows() -> int:
    """Rows from which MLX reads quantized weights once: from Ampere on it has kernels for that."""
    import mlx.core as mx

    return FEWEST_ROWS if int(mx.device_info()["compute_capability_major"]) >= AMPERE else 1


def _is_worth_zeros(x: "mx.array", w: "mx.array", options: dict[str, Any]) -> bool:
    """Whether MLX has those kernels for this product, and its rows take long enough one by one."""
    import mlx.core as mx

    outputs, rows = w.shape[0], x.size // x.shape[-1]
    return (
        bool(options.get("transpose", True))
        and options.get("bits") in MATRIX_BITS
        and x.dtype in (mx.float16, mx.bfloat16)
        and outputs % MATRIX_TILE == 0
        and outputs >= WIDE
        and (rows - 1) * outputs >= WORTH_ZEROS
    )
