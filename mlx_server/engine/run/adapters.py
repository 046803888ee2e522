"""LoRA adapters, and their division among ranks. mlx-lm's modules of them are imported late, since
they import parts of models.

An adapted module adds (x @ a) @ b, scaled, to what the module itself gives. A rank that has some of
its outputs has those of b; one that has some of its inputs has those of a, and finds a part of a
sum.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx_lm.utils import load_adapters

from mlx_server.engine.run.weights import ModelError

OUTPUTS, INPUTS = "all-to-sharded", "sharded-to-all"
"""What each rank has a part of, as MLX calls it."""
DIVIDE = {"shard_linear": shard_linear, "shard_inplace": shard_inplace}
"""What mlx-lm's models divide their modules with."""


def apply_adapter(model: Any, path: Path) -> Any:
    """Raises ModelError."""
    try:
        adapted = load_adapters(model, str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ModelError(
            f"the adapter in {path.name} cannot be applied: {type(error).__name__}: {error}"
        ) from error
    adapted.eval()
    return adapted


@contextmanager
def dividing_adapters(model: Any) -> Iterator[None]:
    """Meanwhile `model.shard` divides adapted modules, too. Raises ValueError where it cannot."""
    from mlx_lm.tuner.dora import DoRALinear

    if any(isinstance(module, DoRALinear) for module in model.modules()):
        raise ValueError("DoRA needs all of a module's weights")
    dividing = [one for module in model.modules() if (one := getattr(type(module), "shard", None))]
    scopes = [one.__globals__ for one in dividing]
    bound = [(scope, name) for scope in scopes for name in DIVIDE if name in scope]
    try:
        for scope, name in bound:
            scope[name] = partial(_divide, DIVIDE[name])
        yield
    except AttributeError as error:
        raise ValueError(f"its family reaches into adapted modules: {error}") from error
    finally:
        for scope, name in bound:
            scope[name] = DIVIDE[name]


def _summed(kind: type) -> type:
    """`kind` for a module that sums over the ranks, each of which has a part of its inputs."""

    class Summed(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            part = mx.distributed.all_sum(x @ self.lora_a, group=self.linear.group)
            added = (self.scale * part @ self.lora_b).astype(x.dtype)
            return cast(mx.array, self.linear(x) + added)

    return Summed


def _divide(
    original: Callable[..., Any],
    module: Module,
    sharding: Any,
    *,
    segments: Any = 1,
    group: mx.distributed.Group | None = None,
) -> Any:
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    divide = partial(original, segments=segments, group=group)
    if not isinstance(module, LoRALinear | LoRASwitchLinear):
        return divide(module, sharding)
    if sharding not in (OUTPUTS, INPUTS):
        raise ValueError("an adapted module is divided in a way of its own")
    own = group or mx.distributed.init()
    if sharding == OUTPUTS:  # (rank, outputs), or of experts (experts, outputs, rank)
        module.lora_b = _part(module.lora_b, 1, segments, own)
    else:  # (inputs, rank), or of experts (experts, rank, inputs)
        axis = 0 if isinstance(module, LoRALinear) else 2
        module.lora_a = _part(module.lora_a, axis, segments, own)
    divided = divide(module.linear, sharding)
    if divided is not None:  # else it was divided in place, and whoever calls it sums
        module.linear = divided
        if sharding == INPUTS:
            module.__class__ = _summed(type(module))
    return module


def _part(weight: mx.array, axis: int, segments: Any, group: mx.distributed.Group) -> mx.array:
    """This rank's, of each of the segments, as MLX cuts a module's own weights."""
    holder: Any = Module()  # type: ignore[no-untyped-call]
    holder.weight = weight
    shard_inplace(holder, lambda path, array: (axis, segments), group=group)
    return cast(mx.array, holder.weight)
