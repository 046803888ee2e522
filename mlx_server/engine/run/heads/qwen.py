"""The head of Qwen3-Next and Qwen 3.5: weights named `mtp`.

Its structure is that of vLLM's qwen3_next_mtp. It reads the states after the model's last norm.
"""

import copy
import re
from collections import defaultdict
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx_lm.models.base import create_attention_mask

from mlx_server.engine.run.heads.trunk import Trunk

EXPERT = re.compile(r"(?P<before>.*\.mlp)\.experts\.(?P<number>\d+)\.(?P<after>.*)")
STACKED = re.compile(r"(?P<before>.*\.mlp)\.experts\.(?P<name>gate_up_proj|down_proj)")
FURTHER_LAYER = re.compile(r"layers\.[1-9]")
USUAL_NORM = 0.5
"""The least mean of a layer's norm; the makers' files have these weights less one."""


class QwenHead(Module):
    def __init__(self, layer: Module, width: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pre_fc_norm_embedding = RMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = RMSNorm(width, eps=eps)
        self.fc = Linear(2 * width, width, bias=False)
        self.layers = [layer]
        self.norm = RMSNorm(width, eps=eps)

    def __call__(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)]
        joined = self.fc(mx.concatenate(both, axis=-1))
        mask = create_attention_mask(joined, cache)
        out: mx.array = self.norm(self.layers[0](joined, mask, cache))
        return out

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        return trunk.output(states)


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[QwenHead, dict[str, mx.array]]:
    """See `head.Build`. Of several layers the first is taken."""
    weights = _unstacked(_stacked(_first(weights)))
    arguments = copy.copy(trunk.arguments)
    if not any(".mlp.switch_mlp." in name for name in weights):
        arguments.num_experts = 0
    arguments.mlp_only_layers, arguments.decoder_sparse_step = [], 1
    place = arguments.full_attention_interval - 1
    layer = trunk.layer_class(arguments, place)
    head = QwenHead(layer, arguments.hidden_size, arguments.rms_norm_eps)
    return head, _with_whole_norms(weights)


def _first(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: one for name, one in weights.items() if not FURTHER_LAYER.match(name)}


def _stacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """With one array of all experts."""
    rest: dict[str, mx.array] = {}
    experts: defaultdict[str, dict[int, mx.array]] = defaultdict(dict)
    for name, weight in weights.items():
        if (found := EXPERT.fullmatch(name)) is None:
            rest[name] = weight
        else:
            whole = f"{found['before']}.switch_mlp.{found['after']}"
            experts[whole][int(found["number"])] = weight
    return rest | {
        name: mx.stack([one[number] for number in sorted(one)]) for name, one in experts.items()
    }


def _unstacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """With the two projections apart that the makers' files have in one."""
    rest: dict[str, mx.array] = {}
    for name, weight in weights.items():
        found = STACKED.fullmatch(name)
        if found is None:
            rest[name] = weight
        elif found["name"] == "down_proj":
            rest[f"{found['before']}.switch_mlp.down_proj.weight"] = weight
        else:
            gate, up = mx.split(weight, 2, axis=-2)
            rest[f"{found['before']}.switch_mlp.gate_proj.weight"] = gate
            rest[f"{found['before']}.switch_mlp.up_proj.weight"] = up
    return rest


def _with_whole_norms(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Conversions by mlx-lm's kin have added the one, others have not. The norms of the layer tell,
    since the others are small either way.
    """
    norms = {name: one for name, one in weights.items() if "norm" in name and one.ndim == 1}
    of_layer = [one.astype(mx.float32) for name, one in norms.items() if name.startswith("layers.")]
    if cast(float, mx.concatenate(of_layer).mean().item()) >= USUAL_NORM:
        return weights
    return weights | {name: one + 1 for name, one in norms.items()}
