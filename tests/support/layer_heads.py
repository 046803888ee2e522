"""Heads of tiny models that are one layer more than the model counts (DeepSeek V3 and its kin), or
that come as layers of their own (MiMo, ERNIE, Nemotron-H).
"""

import re
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_server.engine.run.heads.deepseek import DeepseekHead
from mlx_server.engine.run.heads.ernie import ErnieHead
from mlx_server.engine.run.heads.mimo import MimoHead
from mlx_server.engine.run.heads.nemotron import NemotronHead
from tests.support.architectures import model_of, with_random_matrices

DEEPSEEK = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")
LAYERED = (*DEEPSEEK, "ernie4_5_moe", "mimo", "nemotron_h-moe")
EXPERTS = re.compile(r"(?P<before>.*\.(mlp|mixer))\.switch_mlp\.(?P<name>\w+)\.weight")
SHIPPED = {"fc1": "up_proj", "fc2": "down_proj"}
"""What the makers call that in experts."""
LAYER_OF = {
    **dict.fromkeys(("enorm", "hnorm", "eh_proj"), "layers.0."),
    "final_layernorm": "layers.1.",
}
"""Of Nemotron-H's head."""
KEYS, VALUES = ".embed_q.weight", ".unembed_out.weight"

Weights = dict[str, mx.array]


def random_head(config: dict[str, Any]) -> Weights:
    """By their names in a conversion by mlx-lm, if it kept them."""
    mx.random.seed(7)
    whole = model_of(config)
    args, kind = whole.args, type(whole.layers[0])
    width, eps = args.hidden_size, config["rms_norm_eps"]
    head: nn.Module
    match config["model_type"]:
        case "mimo":
            head = MimoHead(kind(args), width, eps)
        case "ernie4_5_moe":
            head = ErnieHead(kind(args, 0), width, eps, bias=args.use_bias)
        case "nemotron_h":
            head = NemotronHead([kind(args, "*"), kind(args, "E")], width, eps)
        case _:
            head = DeepseekHead(kind(args, args.num_hidden_layers), width, eps)
    weights = with_random_matrices(dict(tree_flatten(head.parameters())), seed=7)
    return {name_of(config, place): weight for place, weight in weights.items()}


def name_of(config: dict[str, Any], place: str) -> str:
    """From the place of a weight in its head."""
    kind = config["model_type"]
    if kind == "mimo":
        return "model.mtp_layers.0." + place.removeprefix("layer.")
    if kind == "ernie4_5_moe":
        part, _, rest = place.partition(".")
        return f"model.mtp_{part}.0.{rest}"
    if kind == "nemotron_h":
        layer = "" if place.startswith("layers.") else LAYER_OF[place.partition(".")[0]]
        return f"mtp.{layer}{place}"
    place = "shared_head." + place if place.startswith("norm.") else place.removeprefix("layer.")
    return f"model.layers.{config['num_hidden_layers']}.{place}"


def joining(config: dict[str, Any]) -> Weights:
    """The projection that passes on the embedding alone."""
    width = config["hidden_size"]
    match config["model_type"]:
        case "mimo":
            return {name_of(config, "input_proj.weight"): mx.eye(width, 2 * width, k=width)}
        case "ernie4_5_moe":
            return {name_of(config, "linear_proj.weight"): mx.eye(width, 2 * width)}
        case _:
            return {name_of(config, "eh_proj.weight"): mx.eye(width, 2 * width)}


def as_shipped(weights: Weights, config: dict[str, Any]) -> Weights:
    """As the makers ship them: experts apart, keys and values in one product, and what the head
    shares with the model there twice.
    """
    raw: Weights = {}
    for key, weight in with_joined_values(weights).items():
        experts = EXPERTS.fullmatch(key)
        if experts is None:
            raw[key] = weight
            continue
        for number, one in enumerate(weight):
            product = SHIPPED.get(experts["name"], experts["name"])
            raw[f"{experts['before']}.experts.{number}.{product}.weight"] = one
    if config["model_type"] in DEEPSEEK:
        raw[name_of(config, "embed_tokens.weight")] = weights["model.embed_tokens.weight"]
        raw[name_of(config, "shared_head.head.weight")] = weights["lm_head.weight"]
    return raw


def with_joined_values(weights: Weights) -> Weights:
    """With the keys and values of latent attention in one product."""
    raw: Weights = {}
    for key, weight in weights.items():
        if key.endswith(KEYS):
            base = key.removesuffix(KEYS)
            both = [weight.swapaxes(-1, -2), weights[base + VALUES]]
            joined = mx.concatenate(both, axis=1)
            raw[f"{base}.kv_b_proj.weight"] = joined.reshape(-1, joined.shape[-1])
        elif not key.endswith(VALUES):
            raw[key] = weight
    return raw
