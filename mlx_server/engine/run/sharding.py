"""A model's division among ranks, by mlx-lm's `shard`: heads and inner widths, a part for each."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _get_classes

from mlx_server.dimensions import HEADS, INNER_WIDTH, KV_HEADS, Names, number
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


def check(path: Path, ranks: int, adapter: Path | None) -> None:
    """Raises ModelError where the model in `path` cannot be divided among so many `ranks`.

    Weights are not touched. A folder that cannot be read is for its load to judge.
    """
    if adapter is not None:
        raise ModelError("LoRA adapters are not applied to a model that is divided among ranks")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind, _ = _get_classes(config)
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not hasattr(kind, "shard"):
        raise ModelError(_no_way(config.get("model_type"), ranks))
    counts = {what: count for what, names in DIVIDED.items() if (count := number(config, names))}
    uneven = [f"{count} {what}" for what, count in counts.items() if count % ranks]
    if uneven:
        common = math.gcd(*counts.values())
        fitting = [str(n) for n in range(2, common + 1) if common % n == 0]
        hint = f"; it can be divided among {' or '.join(fitting)}" if fitting else ""
        raise ModelError(f"{ranks} ranks cannot share its {' and '.join(uneven)}{hint}")


def divide(model: Any, group: mx.distributed.Group) -> None:
    """Leave `model`, whose weights have not been read, this rank's part. Raises ModelError."""
    if not hasattr(model, "shard"):
        raise ModelError(_no_way(type(model).__module__.rpartition(".")[2], group.size()))
    try:
        model.shard(group)
    except ValueError as error:  # groups of quantized weights, say
        raise ModelError(
            f"its weights cannot be divided among {group.size()} ranks: {error}"
        ) from error


def _no_way(model_type: object, ranks: int) -> str:
    return f"mlx-lm has no way to divide models of type {model_type} among {ranks} ranks"
