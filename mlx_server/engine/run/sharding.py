"""A model's division among ranks, by mlx-lm's `shard`: heads and inner widths, a part for each."""

from typing import Any

import mlx.core as mx

from mlx_server.dimensions import Config, uneven_parts
from mlx_server.engine.run.weights import ModelError


def divide(model: Any, config: Config, group: mx.distributed.Group) -> None:
    """Leave `model`, whose weights have not been read, this rank's part.

    Raises ModelError where there is no way.
    """
    ranks = group.size()
    if not hasattr(model, "shard"):
        kind = config.get("model_type")
        raise ModelError(f"mlx-lm has no way to divide models of type {kind} among {ranks} ranks")
    if (problem := uneven_parts(config, ranks)) is not None:
        raise ModelError(problem)
    try:
        model.shard(group)
    except ValueError as error:  # groups of quantized weights, say
        raise ModelError(f"its weights cannot be divided among {ranks} ranks: {error}") from error
