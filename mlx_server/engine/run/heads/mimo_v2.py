"""The head of MiMo-V2-Flash: weights named `mtp.layers`, of layers with a window and sinks, and
without experts.

Its structure is that of vLLM's mimo_v2_mtp and SGLang's mimo_v2_nextn. Before which norm it reads
states is at odds among them: here it is as where SGLang uses several layers, and in llama.cpp.
"""

import mlx.core as mx

from mlx_server.engine.run.heads.deepseek import place
from mlx_server.engine.run.heads.trunk import Trunk
from mlx_server.engine.run.heads.windowed import WindowedHead

FIRST = "0."
SHIPPED, OURS = "pre_mlp_layernorm.", "post_attention_layernorm."
LAST_NORM = "final_layernorm."


def build(trunk: Trunk, weights: dict[str, mx.array]) -> tuple[WindowedHead, dict[str, mx.array]]:
    """See `head.Build`. Of several layers the first is taken, as vLLM does."""
    arguments = trunk.arguments
    layer = trunk.layer_class(arguments, is_moe=False, is_sliding_window=True)
    width, eps = arguments.hidden_size, arguments.layernorm_epsilon
    head = WindowedHead(layer, width, eps, arguments.sliding_window_size)
    first = {name.removeprefix(FIRST): w for name, w in weights.items() if name.startswith(FIRST)}
    converted = trunk.converted(first, "model.layers.0.", 1)
    return head, {
        place(name.replace(SHIPPED, OURS), LAST_NORM): one for name, one in converted.items()
    }
