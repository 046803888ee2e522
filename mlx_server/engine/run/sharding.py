"""A model's division among ranks, by mlx-lm: of each layer heads and inner widths, a part for each
(`shard`), or whole layers (`pipeline`).
"""

from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from mlx_server.dimensions import Config, Division, division, uneven_layers
from mlx_server.engine.run.adapters import dividing_adapters
from mlx_server.engine.run.patches import keep_states_of_pipeline
from mlx_server.engine.run.weights import ModelError


class Layers:
    """The layers of a model that this rank has; the others' are gone.

    Until `join` a pass computes them by themselves, on what embeddings give, and no rank waits for
    another. From then on the states go from the last rank, which has the first layers, to rank 0,
    which alone has the model's logits; other ranks' mean nothing. Raises ValueError.
    """

    def __init__(self, model: Any, group: mx.distributed.Group) -> None:
        self._body = _body(model)
        self._body.pipeline(group)
        if any(layer is None for layer in model.layers):
            raise ValueError("not all of it knows which layers are left")
        self._place = self._body.pipeline_rank, self._body.pipeline_size
        self._body.pipeline_rank, self._body.pipeline_size = 0, 1

    def join(self) -> None:
        keep_states_of_pipeline()
        self._body.pipeline_rank, self._body.pipeline_size = self._place


def divide(
    model: Any, config: Config, group: mx.distributed.Group, wanted: Division, *, adapted: bool
) -> Layers | None:
    """Leave `model`, whose weights have not been read, this rank's part: the layers returned, or a
    part of each. `adapted`: it has an adapter.

    Raises ModelError where there is no way.
    """
    ranks = group.size()
    way, problem = division(config, ranks, wanted, shards=hasattr(model, "shard"))
    if problem is not None:
        raise ModelError(problem)
    try:
        if way == "pipeline":
            return Layers(model, group)
        with dividing_adapters(model) if adapted else nullcontext():
            model.shard(group)
    except ValueError as error:  # groups of quantized weights, say
        what = "layers" if way == "pipeline" else "weights"
        other = way == "tensor" and uneven_layers(config, ranks) is None
        hint = "; it can be divided by layers" if other else ""
        raise ModelError(
            f"its {what} cannot be divided among {ranks} ranks: {error}{hint}"
        ) from error
    return None


def _body(model: Any) -> Any:
    return getattr(model, "language_model", model).model
