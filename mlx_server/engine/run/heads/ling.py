"""The head of Ling 2, 2.5 and 3: one layer more than the model counts, with experts, and weights
named `enorm`, `hnorm`, `eh_proj` and `final_layernorm`.

Its structure is that of inclusionAI's modeling_bailing_moe_v2, SGLang's bailing_moe_nextn, and
vLLM's bailing_moe_mtp and bailing_moe_v3_mtp. It reads the states after the model's last norm, and
goes on from its own after its last norm. In models with linear attention it has the other kind.
"""

import mlx.core as mx

from mlx_server.dimensions import HEAD_REPEATS
from mlx_server.engine.run.heads.deepseek import DeepseekHead, place
from mlx_server.engine.run.heads.trunk import Trunk

LAST_NORM = "final_layernorm."


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[DeepseekHead, dict[str, mx.array]]:
    """See `head.Build`."""
    arguments = trunk.arguments
    layer = trunk.layer_class(arguments, arguments.num_hidden_layers)
    head = DeepseekHead(layer, arguments.hidden_size, arguments.rms_norm_eps)
    weights = {name: one for name, one in weights.items() if not HEAD_REPEATS.match(name)}
    converted = trunk.converted(weights, "model.layers.0.", 1, first_k_dense_replace=0)
    return head, {place(name, LAST_NORM): one for name, one in converted.items()}
