"""The head of ERNIE 4.5: weights named `mtp_block`, `mtp_emb_norm`, `mtp_hidden_norm` and
`mtp_linear_proj`.

Its structure is that of `mtp_layer` in Baidu's ERNIE: it reads the states before the model's last
norm, and its own go through the same norm. Its layer has no experts, as in vLLM's ernie_mtp.
"""

import copy
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx_lm.models.base import create_attention_mask

from mlx_server.engine.run.heads.trunk import Trunk

FIRST = ".0."
"""Before the names of the first of several layers."""


class ErnieHead(Module):
    def __init__(self, layer: Module, width: int, eps: float, *, bias: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.emb_norm = RMSNorm(width, eps=eps)
        self.hidden_norm = RMSNorm(width, eps=eps)
        self.linear_proj = Linear(2 * width, width, bias=bias)
        self.block = layer

    def __call__(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        both = [self.emb_norm(embedded), self.hidden_norm(states)]
        joined = self.linear_proj(mx.concatenate(both, axis=-1))
        out: mx.array = self.block(joined, create_attention_mask(joined, cache), cache)
        return out

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        return trunk.project(states)


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[ErnieHead, dict[str, mx.array]]:
    """See `head.Build`. Of several layers the first is taken."""
    arguments = copy.copy(trunk.arguments)
    arguments.moe_layer_start_index = arguments.num_hidden_layers
    layer = trunk.layer_class(arguments, 0)
    width, eps, bias = arguments.hidden_size, arguments.rms_norm_eps, arguments.use_bias
    head = ErnieHead(layer, width, eps, bias=bias)
    return head, {n.replace(FIRST, ".", 1): w for n, w in weights.items() if FIRST in n}
