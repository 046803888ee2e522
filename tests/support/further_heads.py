"""Heads of tiny models, as those of `layer_heads`: Ling's, K-EXAONE's, LongCat's, MiMo-V2-Flash's
and Step 3.5's.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_server.engine.run.heads.deepseek import DeepseekHead
from mlx_server.engine.run.heads.longcat import HalfLayer
from mlx_server.engine.run.heads.qwen import QwenHead
from mlx_server.engine.run.heads.step import StepHead
from mlx_server.engine.run.heads.windowed import WindowedHead
from tests.support.architectures import model_of, with_random_matrices
from tests.support.layer_heads import EXPERTS, Weights, with_joined_values

LING = ("bailing_moe", "bailing_hybrid", "bailing_moe_v3")
WINDOWED = ("mimo_v2_flash", "step3p5")
FURTHER = (*LING, "exaone_moe", "longcat_flash", *WINDOWED)
OF_LAYER = "layer."
SHIPPED = {
    "longcat_flash": (("enorm.", "enorm.m."), ("hnorm.", "hnorm.m.")),
    "mimo_v2_flash": ((".post_attention_layernorm.", ".pre_mlp_layernorm."),),
    "step3p5": ((".shared_head.", ".transformer.shared_head."),),
}
"""What a head's weights are called in conversions, and by the makers."""
SHIPPED_MODEL = {
    "bailing_moe": ((".gate.gate_proj.", ".gate."),),
    "bailing_hybrid": ((".gate.gate_proj.", ".gate."),),
    "exaone_moe": ((".gate.e_score", ".e_score"),),
    "step3p5": (
        (".mlp.switch_mlp.", ".moe."),
        (".mlp.gate.gate.", ".moe.gate."),
        (".mlp.gate.router_bias", ".moe.router_bias"),
        (".mlp.share_expert.", ".share_expert."),
    ),
}
"""The same of their layers' weights."""


def random_head(config: dict[str, Any]) -> Weights:
    """By their names in a conversion by mlx-lm, if it kept them."""
    mx.random.seed(7)
    weights = dict(tree_flatten(_head(config).parameters()))
    random = with_random_matrices(weights, seed=7)
    return {name_of(config, place): weight for place, weight in random.items()}


def _head(config: dict[str, Any]) -> nn.Module:
    whole = model_of(config)
    args, kind = whole.args, type(whole.layers[0])
    width, eps = args.hidden_size, config["rms_norm_eps"]
    match config["model_type"]:
        case "exaone_moe":
            args.layer_types, args.is_moe_layer = ["full_attention"], [False]
            return QwenHead(kind(args, 0), width, eps)
        case "longcat_flash":
            return DeepseekHead(HalfLayer(kind(args)), width, eps)
        case "mimo_v2_flash":
            layer = kind(args, is_moe=False, is_sliding_window=True)
            return WindowedHead(layer, width, eps, args.sliding_window_size)
        case "step3p5":
            args.moe_layers_enum = "1"  # a dense layer with a window
            return StepHead(kind(args, 0), width, eps, args.sliding_window, args.vocab_size)
        case _:
            return DeepseekHead(kind(args, args.num_hidden_layers), width, eps)


def name_of(config: dict[str, Any], place: str) -> str:
    """From the place of a weight in its head."""
    kind, inner = config["model_type"], place.removeprefix(OF_LAYER)
    if kind == "exaone_moe":
        return "mtp." + place
    if kind == "longcat_flash":
        if place.startswith("norm."):
            return "model.mtp." + place
        return "model.mtp.layers.0." + inner.replace("mlp.", "transformer_layer.mlp.")
    if kind == "step3p5":
        shared = place.startswith(("norm.", "output."))
        inner = "shared_head." + place if shared else inner
    elif place.startswith("norm."):
        inner = "final_layer" + place
    before = "model.mtp.layers.0." if kind == "mimo_v2_flash" else _before(config)
    return before + inner


def _before(config: dict[str, Any]) -> str:
    return f"model.layers.{config['num_hidden_layers']}."


def joining(config: dict[str, Any], weights: Weights) -> Weights:
    """The projection that passes on the embedding alone, and the model's output for one of its
    own.
    """
    width = config["hidden_size"]
    product = "fc" if config["model_type"] == "exaone_moe" else "eh_proj"
    joined = {name_of(config, f"{product}.weight"): mx.eye(width, 2 * width)}
    output = name_of(config, "output.weight")
    return joined | ({output: weights["lm_head.weight"]} if output in weights else {})


def as_shipped(weights: Weights, config: dict[str, Any]) -> Weights:
    """As the makers ship them: experts apart but Step 3.5's, whose norms' weights are less one, and
    keys and values in one product.
    """
    kind = config["model_type"]
    raw: Weights = {}
    for key, weight in with_joined_values(weights).items():
        experts = EXPERTS.fullmatch(key)
        if experts is not None and kind != "step3p5":
            for number, one in enumerate(weight):
                raw[f"{experts['before']}.experts.{number}.{experts['name']}.weight"] = one
            continue
        if kind == "step3p5" and "norm" in key:
            weight = weight - 1
        raw[_shipped(kind, key, config)] = weight
    if kind == "longcat_flash":
        raw["model.mtp.embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    return raw


def _shipped(kind: str, key: str, config: dict[str, Any]) -> str:
    of_head = "mtp." in key or key.startswith(_before(config))
    renamed = (*SHIPPED_MODEL.get(kind, ()), *(SHIPPED.get(kind, ()) if of_head else ()))
    for ours, theirs in renamed:
        key = key.replace(ours, theirs)
    return key
