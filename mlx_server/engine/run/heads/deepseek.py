"""The head of DeepSeek V3 and its kin: one layer more than the model counts, and weights named
`enorm`, `hnorm`, `eh_proj` and `shared_head`.

Its structure is that of vLLM's deepseek_mtp. It reads the states after the model's last norm, and
goes on from its own after its last norm, as in SGLang's deepseek_nextn. Its embeddings and output
projection are the model's, as DeepSeek-V3's README_WEIGHTS says.
"""

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import CacheList, KVCache

from mlx_server.dimensions import HEAD_REPEATS
from mlx_server.engine.run.heads.trunk import Trunk

OWN = ("enorm.", "hnorm.", "eh_proj.")
LAST_NORM = "shared_head.norm."


class DeepseekHead(Module):
    def __init__(self, layer: Module, width: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.enorm = RMSNorm(width, eps=eps)
        self.hnorm = RMSNorm(width, eps=eps)
        self.eh_proj = Linear(2 * width, width, bias=False)
        self.layer = layer
        self.norm = RMSNorm(width, eps=eps)

    def __call__(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        out: mx.array = self.norm(self.bare(embedded, states, cache))
        return out

    def bare(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        """Before its last norm."""
        both = [self.enorm(embedded), self.hnorm(states)]
        joined = self.eh_proj(mx.concatenate(both, axis=-1))
        out: mx.array = self.layer(joined, self.mask(joined, cache), cache)
        return out

    def mask(self, joined: mx.array, cache: Any) -> Any:
        keys = cache[0] if isinstance(cache, CacheList) else cache
        return create_attention_mask(joined, keys, return_array=True)

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        return trunk.output(states)


def sparse_cache() -> CacheList:
    """Of a layer with an index of its keys (DeepSeek V3.2)."""
    return CacheList(KVCache(), KVCache())


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[DeepseekHead, dict[str, mx.array]]:
    """See `head.Build`."""
    arguments = trunk.arguments
    layer = trunk.layer_class(arguments, arguments.num_hidden_layers)
    head = DeepseekHead(layer, arguments.hidden_size, arguments.rms_norm_eps)
    weights = {name: one for name, one in weights.items() if not HEAD_REPEATS.match(name)}
    converted = trunk.converted(weights, "model.layers.0.", 1)
    return head, {place(name, LAST_NORM): one for name, one in converted.items()}


def place(name: str, last_norm: str) -> str:
    """In a `DeepseekHead`, of a weight whose last norm's names begin with `last_norm`."""
    if name.startswith(last_norm):
        return "norm." + name.removeprefix(last_norm)
    return name if name.startswith(OWN) else "layer." + name
