"""A layer of a model's own that guesses the token after the next one (multi-token prediction:
Gloeckle et al. 2024, DeepSeek-AI 2024), built of what its checkpoint ships.

mlx-lm leaves these weights out.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import dequantize_model, infer_quant_config

from mlx_server.dimensions import Config, families, head_weights
from mlx_server.engine.cache.layout import Cache
from mlx_server.engine.protocol import Batching, Sharing
from mlx_server.engine.run.batching import PADDED
from mlx_server.engine.run.heads import (
    deepseek,
    ernie,
    exaone,
    ling,
    longcat,
    mimo,
    mimo_v2,
    nemotron,
    qwen,
    step,
)
from mlx_server.engine.run.heads.trunk import BackboneTrunk, BareTrunk, Trunk, WordTrunk
from mlx_server.engine.run.heads.unread import HELD
from mlx_server.engine.run.kv import KvCost
from mlx_server.engine.run.weights import read_weights

log = logging.getLogger("mlx_server.engine")

Weights = dict[str, mx.array]
Build = Callable[[Trunk, Weights], tuple[Module, Weights]]
"""From a model and the names in its checkpoint, without what comes before them, to a head and its
weights by their places there. Raises ValueError, KeyError.

A head is called with embeddings of tokens and the states before them (rows, tokens, width) and its
cache, and gives states that may come before the next ones; its `project` makes logits of them.
"""


@dataclass(frozen=True)
class Kind:
    """How a family's heads are built, which states they read, and their layer's cache."""

    build: Build
    trunk: type[Trunk] = Trunk
    new_cache: Callable[[], Any] = KVCache


QWEN = Kind(qwen.build)
DEEPSEEK = Kind(deepseek.build)
DEEPSEEK_SPARSE = Kind(deepseek.build, new_cache=deepseek.sparse_cache)
LING = Kind(ling.build, trunk=WordTrunk)

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), QWEN),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_lite"), DEEPSEEK),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), DEEPSEEK_SPARSE),
    **dict.fromkeys(("bailing_moe", "bailing_hybrid", "bailing_moe_v3"), LING),
    "ernie4_5_moe": Kind(ernie.build, trunk=BareTrunk),
    "exaone_moe": Kind(exaone.build),
    "longcat_flash": Kind(longcat.build),
    "mimo": Kind(mimo.build, trunk=BareTrunk),
    "mimo_v2_flash": Kind(mimo_v2.build, trunk=BareTrunk),
    "nemotron_h": Kind(nemotron.build, trunk=BackboneTrunk),
    "step3p5": Kind(step.build, trunk=BareTrunk),
}
"""By model_type; `dimensions.head_weights` knows the same ones."""


class Head:
    """The head `model` of the model that is `trunk`, and its KV cache."""

    mixes = False
    batching = Batching(Sharing.ANY, Sharing.ANY)
    caches = PADDED

    def __init__(self, trunk: Trunk, model: Any, new_cache: Callable[[], Any] = KVCache) -> None:
        self.trunk = trunk
        self.model = model
        self._new_cache = new_cache
        self.weights_bytes = read_weights(model)
        # One token, never computed: only shapes are asked for.
        token, cache = mx.array([[0]]), self.new_cache()
        states = trunk.embeddings(token)
        self(token, states, cache)
        self.kv_cost = KvCost(cache, held=HELD * states.nbytes)

    def new_cache(self) -> Cache:
        return [self._new_cache()]

    def __call__(self, tokens: mx.array, states: mx.array, cache: Cache) -> mx.array:
        """Its own hidden states (rows, tokens, width), which give logits of the tokens after
        `tokens` (rows, tokens); `states` are those of the tokens before them.
        """
        out: mx.array = self.model(self.trunk.embeddings(tokens), states, cache[0])
        return out

    def project(self, states: mx.array) -> mx.array:
        """Logits (…, vocab) from its own states (…, width)."""
        logits: mx.array = self.model.project(states, self.trunk)
        return logits


def load_head(path: Path, config: Config, model: Any, *, float32: bool) -> Head | None:
    """The head that the folder `path` of `model` has, if one that can be used."""
    names = head_weights(config)
    kind = next((KINDS[one] for one in families(config) if one in KINDS), None)
    if names is None or kind is None:
        return None
    weights: Weights = {}
    for file in path.glob("model*.safetensors"):
        read: Any = mx.load(str(file))
        weights |= {names.sub("", name): one for name, one in read.items() if names.match(name)}
    if not weights:
        return None
    try:
        trunk = kind.trunk(model)
        head, weights = kind.build(trunk, weights)
        _fill(head, weights)
        made = Head(trunk, _in_float32(head) if float32 else head, kind.new_cache)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("event=own_head_off reason=%r", f"{type(error).__name__}: {error}")
        return None
    log.info("event=own_head bytes=%d", made.weights_bytes)
    return made


def _fill(head: Any, weights: Mapping[str, mx.array]) -> None:
    """Quantize what `weights` have quantized. Raises ValueError where they are not the head's."""

    def quantized(path: str, layer: Any) -> Any:
        return f"{path}.scales" in weights and infer_quant_config(path, layer, weights)

    quantize(head, class_predicate=quantized)
    head.load_weights(list(weights.items()))
    head.eval()


def _in_float32(head: Any) -> Any:
    head = dequantize_model(head)
    head.set_dtype(mx.float32)
    return head
