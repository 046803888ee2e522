"""A layer of a model's own that guesses the token after the next one (multi-token prediction:
Gloeckle et al. 2024, DeepSeek-AI 2024), built of what its checkpoint ships.

mlx-lm leaves these weights out.
"""

import logging
from collections.abc import Callable, Mapping
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
from mlx_server.engine.run.heads import qwen
from mlx_server.engine.run.heads.unread import HELD
from mlx_server.engine.run.kv import KvCost
from mlx_server.engine.run.weights import read_weights

log = logging.getLogger("mlx_server.engine")

Weights = dict[str, mx.array]
Build = Callable[[Any, Weights], tuple[Module, Weights]]
"""From a model without its output projection and the names in its checkpoint, without what comes
before them, to a head and its weights by their places there. Raises ValueError, KeyError.
"""

KINDS: dict[str, Build] = dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), qwen.build)
"""By model_type; `dimensions.head_weights` knows the same ones."""


class Trunk:
    """A model in two steps: to its last hidden states (rows, tokens, width), and to logits."""

    def __init__(self, model: Any) -> None:
        self._text = getattr(model, "language_model", model)

    @property
    def body(self) -> Any:
        return self._text.model

    @property
    def arguments(self) -> Any:
        return self._text.args

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        states: mx.array = self.body(tokens, cache=cache)
        return states

    def project(self, states: mx.array) -> mx.array:
        tied = "lm_head" not in self._text
        project = self.body.embed_tokens.as_linear if tied else self._text.lm_head
        logits: mx.array = project(states)
        return logits


class Head:
    """The head `model` of the model that is `trunk`, and its KV cache."""

    mixes = False
    batching = Batching(Sharing.ANY, Sharing.ANY)
    caches = PADDED

    def __init__(self, trunk: Trunk, model: Any) -> None:
        self.trunk = trunk
        self.model = model
        self.weights_bytes = read_weights(model)
        # One token, never computed: only shapes are asked for.
        token, cache = mx.array([[0]]), self.new_cache()
        states = trunk.body.embed_tokens(token)
        self(token, states, cache)
        self.kv_cost = KvCost(cache)
        self.kv_cost.fixed += HELD * states.nbytes

    def new_cache(self) -> Cache:
        return [KVCache()]

    def __call__(self, tokens: mx.array, states: mx.array, cache: Cache) -> mx.array:
        """Its own hidden states (rows, tokens, width), which give logits of the tokens after
        `tokens` (rows, tokens); `states` are those of the tokens before them.
        """
        out: mx.array = self.model(self.trunk.body.embed_tokens(tokens), states, cache[0])
        return out


def load_head(path: Path, config: Config, model: Any, *, float32: bool) -> Head | None:
    """The head that the folder `path` of `model` has, if one that can be used."""
    names = head_weights(config)
    build = next((KINDS[kind] for kind in families(config) if kind in KINDS), None)
    if names is None or build is None:
        return None
    weights: Weights = {}
    for file in path.glob("model*.safetensors"):
        read: Any = mx.load(str(file))
        weights |= {names.sub("", name): one for name, one in read.items() if names.match(name)}
    if not weights:
        return None
    trunk = Trunk(model)
    try:
        head, weights = build(trunk, weights)
        _fill(head, weights)
        made = Head(trunk, _in_float32(head) if float32 else head)
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
