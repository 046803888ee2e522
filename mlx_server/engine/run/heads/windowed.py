"""Heads with a window of keys: those of MiMo-V2-Flash and Step 3.5.

They read the states before the model's last norm, and go on from their own before their last norm.
"""

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.base import create_attention_mask

from mlx_server.engine.run.heads.deepseek import DeepseekHead
from mlx_server.engine.run.heads.trunk import Trunk


class WindowedHead(DeepseekHead):
    """Its `layer` sees the last `window` tokens, or all if that is None. Its cache keeps all, so
    that what was guessed can be forgotten.
    """

    def __init__(self, layer: Module, width: int, eps: float, window: int | None) -> None:
        super().__init__(layer, width, eps)
        self.window = window

    def __call__(self, embedded: mx.array, states: mx.array, cache: Any) -> mx.array:
        return self.bare(embedded, states, cache)

    def project(self, states: mx.array, trunk: Trunk) -> mx.array:
        return trunk.output(self.norm(states))

    def mask(self, joined: mx.array, cache: Any) -> Any:
        return create_attention_mask(joined, cache, window_size=self.window, return_array=True)
