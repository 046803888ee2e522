"""The head of LongCat-Flash: weights named `mtp`, of a layer that is half of one of the model's and
has no experts.

Its structure is that of vLLM's longcat_flash_mtp and SGLang's longcat_flash_nextn. It reads the
states after the model's last norm, and goes on from its own after its last norm.
"""

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_server.dimensions import HEAD_REPEATS
from mlx_server.engine.run.heads.deepseek import DeepseekHead, place
from mlx_server.engine.run.heads.trunk import Trunk

SHIPPED = (("layers.0.", ""), ("norm.m.", "norm."), ("transformer_layer.mlp.", "mlp."))
"""What the makers call it, and its name here."""
LAST_NORM = "norm."
ATTENTION, FIRST_ATTENTION = "self_attn.", "self_attn.0."
"""Of half a layer, and of a whole one."""


class HalfLayer(Module):
    """The first half of `layer`, without its experts."""

    def __init__(self, layer: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.input_layernorm = layer.input_layernorm[0]
        self.self_attn = layer.self_attn[0]
        self.post_attention_layernorm = layer.post_attention_layernorm[0]
        self.mlp = layer.mlps[0]

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask=mask, cache=cache)
        out: mx.array = x + self.mlp(self.post_attention_layernorm(x))
        return out


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[DeepseekHead, dict[str, mx.array]]:
    """See `head.Build`."""
    arguments = trunk.arguments
    layer = HalfLayer(trunk.layer_class(arguments))
    head = DeepseekHead(layer, arguments.hidden_size, arguments.rms_norm_eps)
    named = {_named(name): one for name, one in weights.items() if not HEAD_REPEATS.match(name)}
    whole = {name.replace(ATTENTION, FIRST_ATTENTION): one for name, one in named.items()}
    converted = trunk.converted(whole, "model.layers.0.", 1, num_layers=1)
    return head, {
        place(name.replace(FIRST_ATTENTION, ATTENTION), LAST_NORM): one
        for name, one in converted.items()
    }


def _named(name: str) -> str:
    for theirs, ours in SHIPPED:
        name = name.replace(theirs, ours, 1)
    return name
