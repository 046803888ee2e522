"""The head of Step 3.5: layers more than the model counts, with a window, without experts, and with
an output projection each.

Its structure is that of vLLM's step3p5_mtp and SGLang's step3p5_mtp.
"""

import copy
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear

from mlx_server.engine.run.heads.deepseek import OWN
from mlx_server.engine.run.heads.trunk import Trunk
from mlx_server.engine.run.heads.windowed import WindowedHead

SHIPPED = "transformer."
"""Before some names as the makers ship them, with the weights of norms less one."""
LAST = "shared_head."
WINDOWED, WINDOWED_BASE = "sliding_attention", 10000.0
"""Kind of its layer, and base of its positions, where config.json tells of the model's alone."""


class StepHead(WindowedHead):
    def __init__(
        self, layer: Module, width: int, eps: float, window: int | None, vocab_size: int
    ) -> None:
        super().__init__(layer, width, eps, window)
        self.output = Linear(width, vocab_size, bias=False)

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        logits: mx.array = self.output(self.norm(states))
        return logits


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[StepHead, dict[str, mx.array]]:
    """See `head.Build`. Of several layers the first is taken, as vLLM does."""
    arguments = copy.copy(trunk.arguments)
    place = arguments.num_hidden_layers
    if arguments.layer_types:
        arguments.layer_types = _up_to(arguments.layer_types, place, WINDOWED)
    if isinstance(arguments.rope_theta, list):
        arguments.rope_theta = _up_to(arguments.rope_theta, place, WINDOWED_BASE)
    layer = trunk.layer_class(arguments, place)
    window = arguments.sliding_window if layer.is_sliding else None
    width, eps, vocab_size = arguments.hidden_size, arguments.rms_norm_eps, arguments.vocab_size
    head = StepHead(layer, width, eps, window, vocab_size)
    if any(name.startswith(SHIPPED) for name in weights):
        weights = {n: one + 1 if "norm" in n else one for n, one in weights.items()}
    return head, {_place(name.removeprefix(SHIPPED)): one for name, one in weights.items()}


def _up_to(values: list[Any], place: int, usual: Any) -> list[Any]:
    return [*values, *[usual] * (place + 1 - len(values))]


def _place(name: str) -> str:
    if name.startswith(LAST):
        return name.removeprefix(LAST)
    return name if name.startswith(OWN) else "layer." + name
