"""A model's division among ranks, by mlx-lm's `shard`: heads and inner widths, a part for each."""

import math
from typing import Any

import mlx.core as mx

from mlx_server.dimensions import HEADS, INNER_WIDTH, KV_HEADS, Config, Names, number
from mlx_server.engine.run.weights import ModelError

DIVIDED: dict[str, Names] = {
    "attention heads": HEADS,
    "key and value heads": KV_HEADS,
    "linear key heads": ("linear_num_key_heads",),
    "linear value heads": ("linear_num_value_heads",),
    "inner dimensions": INNER_WIDTH,
    "inner dimensions of an expert": ("moe_intermediate_size",),
    "inner dimensions of shared experts": ("shared_expert_intermediate_size",),
}
"""What each rank gets an equal number of. mlx-lm does not check it."""


def divide(model: Any, config: Config, group: mx.distributed.Group) -> None:
    """Leave `model`, whose weights have not been read, this rank's part.

    Raises ModelError where there is no way.
    """
    ranks = group.size()
    if not hasattr(model, "shard"):
        kind = config.get("model_type")
        raise ModelError(f"mlx-lm has no way to divide models of type {kind} among {ranks} ranks")
    check_counts(config, ranks)
    try:
        model.shard(group)
    except ValueError as error:  # groups of quantized weights, say
        raise ModelError(f"its weights cannot be divided among {ranks} ranks: {error}") from error


def check_counts(config: Config, ranks: int) -> None:
    """Raises ModelError where so many ranks cannot have equal parts."""
    counts = {what: count for what, names in DIVIDED.items() if (count := number(config, names))}
    uneven = [f"{count} {what}" for what, count in counts.items() if count % ranks]
    if not uneven:
        return
    common = math.gcd(*counts.values())
    fitting = [str(n) for n in range(2, common + 1) if common % n == 0]
    hint = f"; it can be divided among {' or '.join(fitting)}" if fitting else ""
    raise ModelError(f"{ranks} ranks cannot share its {' and '.join(uneven)}{hint}")
