"""The head of MiMo: weights named `mtp_layers`.

Its structure is that of vLLM's mimo_mtp: what it joins comes in the other order than elsewhere. It
reads the states before the model's last norm, and goes on from its own before its last norm.
"""

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx_lm.models.base import create_attention_mask

from mlx_server.engine.run.heads.trunk import Trunk

FIRST = "0."
OWN = ("token_layernorm.", "hidden_layernorm.", "input_proj.", "final_layernorm.")


class MimoHead(Module):
    def __init__(self, layer: Module, width: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.token_layernorm = RMSNorm(width, eps=eps)
        self.hidden_layernorm = RMSNorm(width, eps=eps)
        self.input_proj = Linear(2 * width, width, bias=False)
        self.layer = layer
        self.final_layernorm = RMSNorm(width, eps=eps)

    def __call__(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        both = [self.hidden_layernorm(states), self.token_layernorm(embedded)]
        joined = self.input_proj(mx.concatenate(both, axis=-1))
        out: mx.array = self.layer(joined, create_attention_mask(joined, cache), cache)
        return out

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        return trunk.output(self.final_layernorm(states))


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[MimoHead, dict[str, mx.array]]:
    """See `head.Build`. Of several layers the first is taken."""
    arguments = trunk.arguments
    layer = trunk.layer_class(arguments)
    head = MimoHead(layer, arguments.hidden_size, arguments.rms_norm_eps)
    first = {name.removeprefix(FIRST): w for name, w in weights.items() if name.startswith(FIRST)}
    return head, {_place(name): weight for name, weight in first.items()}


def _place(name: str) -> str:
    return name if name.startswith(OWN) else "layer." + name
