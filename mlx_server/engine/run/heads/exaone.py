"""The head of K-EXAONE: weights named `mtp`, as Qwen's are.

Its structure is that of vLLM's exaone_moe_mtp: it joins as Qwen's head does. Its layer has no
experts and, as `mtp_layer_types` in the published config.json says, sees all tokens, so that it has
no positions. It reads the states after the model's last norm.
"""

import copy

import mlx.core as mx

from mlx_server.engine.run.heads.qwen import QwenHead
from mlx_server.engine.run.heads.trunk import Trunk

SEES_ALL = "full_attention"


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[QwenHead, dict[str, mx.array]]:
    """See `head.Build`."""
    arguments = copy.copy(trunk.arguments)
    place = arguments.num_hidden_layers
    arguments.layer_types = [*arguments.layer_types[:place], SEES_ALL]
    arguments.is_moe_layer = [*arguments.is_moe_layer[:place], False]
    layer = trunk.layer_class(arguments, place)
    return QwenHead(layer, arguments.hidden_size, arguments.rms_norm_eps), weights
