"""Tiny models with a head of their own that guesses further tokens, as checkpoints have them."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5, qwen3_next

from mlx_server.engine.run.heads.qwen import QwenHead
from tests.support import further_heads, layer_heads
from tests.support.architectures import (
    ARCHITECTURES,
    VOCAB_SIZE,
    model_of,
    random_weights,
    with_random_matrices,
)
from tests.support.further_heads import FURTHER
from tests.support.layer_heads import LAYERED

QWEN = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
HEADED = (*QWEN, *LAYERED, *FURTHER)
GROUP, BITS = 32, 8
ADDING = ("o_proj", "out_proj", "attention.dense", "down_proj", "fc2")
"""Names of products whose results are added to what a layer gets."""
NORMS = re.compile(
    r"(layernorm|[qk]_norm|model\.norm|mtp\.norm|language_model\.norm|pre_fc_norm_\w+)\.weight$"
)
EXPERTS = re.compile(r"(?P<before>.*\.mlp)\.switch_mlp\.(?P<name>\w+)\.weight")

Weights = dict[str, mx.array]


def build_headed(
    folder: Path,
    name: str,
    *,
    agreeing: bool = True,
    raw: bool = False,
    quantized: str = "",
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """Write a random model of `ARCHITECTURES[name]` with a random head to `folder`.

    `agreeing`: layers add nothing, and the head guesses what the model says. `raw`: as the makers
    ship it, and not as mlx-lm converts it. `quantized`: what the names of quantized weights begin
    with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(ARCHITECTURES[name]))
    text = config.get("text_config", config)
    text["vocab_size"] = vocab_size
    if name == "qwen3_5":
        text["num_experts"] = 0
    weights = random_weights(config, 0) | _heads_weights(config, name)
    if agreeing:
        weights = {
            key: mx.zeros_like(one) if any(part in key for part in ADDING) else one
            for key, one in weights.items()
        }
        weights |= _joining(config, name, weights)
    if raw:
        weights = _as_shipped(weights, config, name)
    if quantized:
        config["quantization"] = {"group_size": GROUP, "bits": 4}
        weights = _quantized(weights, quantized)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def _prefix(config: dict[str, Any]) -> str:
    return "language_model.mtp." if "text_config" in config else "mtp."


def _heads_weights(config: dict[str, Any], name: str) -> Weights:
    if name in FURTHER:
        return further_heads.random_head(config)
    return layer_heads.random_head(config) if name in LAYERED else _random_head(config)


def _joining(config: dict[str, Any], name: str, weights: Weights) -> Weights:
    if name in FURTHER:
        return further_heads.joining(config, weights)
    if name in LAYERED:
        return layer_heads.joining(config)
    return {_prefix(config) + "fc.weight": mx.eye(32, 64)}


def _as_shipped(weights: Weights, config: dict[str, Any], name: str) -> Weights:
    if name in FURTHER:
        return further_heads.as_shipped(weights, config)
    if name in LAYERED:
        return layer_heads.as_shipped(weights, config)
    return raw_weights(weights, name)


def _random_head(config: dict[str, Any]) -> Weights:
    whole = model_of(config)
    text = getattr(whole, "language_model", whole)
    kind = qwen3_5.DecoderLayer if text is not whole else qwen3_next.Qwen3NextDecoderLayer
    layer: nn.Module = kind(text.args, text.args.full_attention_interval - 1)
    head = QwenHead(layer, text.args.hidden_size, text.args.rms_norm_eps)
    weights = with_random_matrices(dict(tree_flatten(head.parameters())), seed=7)
    return {_prefix(config) + name: weight for name, weight in weights.items()}


def raw_weights(weights: Weights, name: str) -> Weights:
    """As the makers ship them: norms less one, convolutions otherwise turned, experts apart or with
    two products in one.
    """
    raw: Weights = {}
    for key, weight in weights.items():
        for ours, theirs in (
            ("language_model.model.", "model.language_model."),
            ("language_model.", ""),
        ):
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        if NORMS.search(key):
            weight = weight - 1
        if "conv1d" in key:
            weight = weight.moveaxis(1, 2)
        experts = EXPERTS.fullmatch(key)
        if experts is None:
            raw[key] = weight
        elif name == "qwen3_next":
            for number, one in enumerate(weight):
                raw[f"{experts['before']}.experts.{number}.{experts['name']}.weight"] = one
        else:
            raw[f"{experts['before']}.experts.{experts['name']}"] = weight
    for key in [key for key in raw if key.endswith(".experts.gate_proj")]:
        up = raw.pop(key.replace("gate_proj", "up_proj"))
        both = mx.concatenate([raw.pop(key), up], axis=-2)
        raw[key.replace("gate_proj", "gate_up_proj")] = both
    return raw


def _quantized(weights: Weights, beginning: str) -> Weights:
    made: Weights = {}
    for key, weight in weights.items():
        fits = weight.ndim > 1 and weight.shape[-1] % GROUP == 0 and "conv1d" not in key
        base = key.removesuffix("weight")
        fits &= f"{base}e_score_correction_bias" not in weights  # a router, which is no layer
        if not (fits and key.startswith(beginning)):
            made[key] = weight
            continue
        packed = mx.quantize(weight, group_size=GROUP, bits=BITS)
        made |= zip((key, f"{base}scales", f"{base}biases"), packed, strict=True)
    return made
