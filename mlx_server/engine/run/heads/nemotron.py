"""The head of Nemotron-H: weights named `mtp`, of several layers with attention in one of them.

Its structure is that of vLLM's nemotron_h_mtp. It reads the states after the model's last norm.
"""

import itertools
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx_lm.models.base import create_attention_mask

from mlx_server.engine.run.heads.trunk import Trunk

ATTENTION, EXPERTS, PLAIN = "*", "E", "-"
FIRST = ("enorm.", "hnorm.", "eh_proj.")
LAST = "final_layernorm."


class NemotronHead(Module):
    def __init__(self, layers: list[Module], width: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.enorm = RMSNorm(width, eps=eps)
        self.hnorm = RMSNorm(width, eps=eps)
        self.eh_proj = Linear(2 * width, width, bias=False)
        self.layers = layers
        self.final_layernorm = RMSNorm(width, eps=eps)

    def __call__(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        both = [self.enorm(embedded), self.hnorm(states)]
        x = self.eh_proj(mx.concatenate(both, axis=-1))
        mask = create_attention_mask(x, cache)
        for layer in self.layers:
            x = layer(x, mask, cache)
        out: mx.array = self.final_layernorm(x)
        return out

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        return trunk.output(states)


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[NemotronHead, dict[str, mx.array]]:
    """See `head.Build`. Raises ValueError for several layers with attention, too."""
    arguments = trunk.arguments
    kinds = [_kind(weights, f"layers.{number}.mixer.") for number in _numbers(weights)]
    if kinds.count(ATTENTION) != 1:
        raise ValueError(f"its layers are of the kinds {kinds}, of which one shall have attention")
    layers = [trunk.layer_class(arguments, kind) for kind in kinds]
    head = NemotronHead(layers, arguments.hidden_size, arguments.layer_norm_epsilon)
    converted = trunk.converted(weights, "backbone.", len(kinds))
    return head, {_place(name): weight for name, weight in converted.items()}


def _numbers(weights: dict[str, mx.array]) -> list[int]:
    """Of the layers, as far as there are any."""

    def there(number: int) -> bool:
        return any(name.startswith(f"layers.{number}.") for name in weights)

    return list(itertools.takewhile(there, itertools.count()))


def _kind(weights: dict[str, mx.array], before: str) -> str:
    """mlx-lm's letter for a layer, the names of whose parts come after `before`."""
    if f"{before}q_proj.weight" in weights:
        return ATTENTION
    return EXPERTS if f"{before}gate.weight" in weights else PLAIN


def _place(name: str) -> str:
    _, _, part = name.removeprefix("layers.").partition(".")
    return part if part.startswith((*FIRST, LAST)) else name
