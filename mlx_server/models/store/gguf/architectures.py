"""What GGUF calls the parts of the models that can be converted, and their configurations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mlx_server.errors import BadRequest
from mlx_server.models.store.gguf.reading import GgufFile

TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
PLAIN = ATTENTION | MLP | {"ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA = ATTENTION | MLP
GEMMA |= {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """`parts` are a layer's modules, `biased` those with a bias. Norms in the file are larger by
    `norm_shift` than in MLX's model; `half` is the type of scales and norms beside quants.
    """

    model_type: str
    parts: dict[str, str]
    config: Callable[[GgufFile], dict[str, Any]]
    biased: frozenset[str] = frozenset()
    norm_shift: float = 0.0
    half: Literal["float16", "bfloat16"] = "float16"

    def module(self, tensor: str) -> str:
        """The module that a tensor is part of. Raises BadRequest if there is none."""
        match tensor.split("."):
            case ["blk", number, part, kind] if number.isdecimal() and part in self.parts:
                if kind == "weight" or (kind == "bias" and part in self.biased):
                    return f"model.layers.{number}.{self.parts[part]}"
            case [part, "weight"] if part in TOP_LEVEL:
                return TOP_LEVEL[part]
        raise BadRequest(f"it has a tensor that a {self.model_type} model has not: {tensor}")


def architecture_of(file: GgufFile) -> Architecture:
    """Raises BadRequest for one that cannot be converted."""
    found = ARCHITECTURES.get(file.architecture)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise BadRequest(f"its architecture is {file.architecture!r}; only {known} are supported")
    if file.option("expert_count", 0):
        raise BadRequest("mixtures of experts are not supported")
    return found


def common_config(file: GgufFile, vocab_size: int, *, tied: bool) -> dict[str, Any]:
    heads = file.value("attention.head_count")
    width = file.value("embedding_length")
    return {
        "hidden_size": width,
        "num_hidden_layers": file.value("block_count"),
        "intermediate_size": file.value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.option("attention.head_count_kv", heads),
        "head_dim": file.option("attention.key_length", width // heads),
        "rms_norm_eps": file.decimal("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "max_position_embeddings": file.value("context_length"),
        "rope_theta": file.option("rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
    }


def _scaled(file: GgufFile) -> dict[str, Any]:
    """How positions beyond those of training are told."""
    kind = file.option("rope.scaling.type", "none")
    factor = file.option("rope.scaling.factor", 1.0)
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        original = file.value("rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": factor}
        return {"rope_scaling": scaling | {"original_max_position_embeddings": original}}
    raise BadRequest(f"its position scaling {kind!r} is not supported")


def _llama(file: GgufFile) -> dict[str, Any]:
    # GGUF interleaves the rows of Llama's q and k projections.
    config = {"rope_traditional": True} | _scaled(file)
    if (divisors := file.tensors.get("rope_freqs.weight")) is not None:
        config["rope_scaling"] = _llama3_scaling(divisors.data.tolist(), file)
    return config


def _llama3_scaling(divisors: list[float], file: GgufFile) -> dict[str, Any]:
    """Llama 3.1 ships each frequency's divisor; mlx-lm wants the formula's parameters."""
    factor = round(max(divisors), 3)
    base = file.option("rope.freq_base", 10000.0)
    expected = list(_llama3_divisors(factor, base, len(divisors)))
    if any(abs(a - b) > 0.01 * b for a, b in zip(divisors, expected, strict=True)):
        raise BadRequest("its rope_freqs are not those of Llama 3's position scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama3_divisors(factor: float, base: float, count: int) -> Iterator[float]:
    """Meta's formula: long wavelengths are stretched by `factor`, short ones not, smoothly."""
    for index in range(count):
        rotations = 8192 / (6.283185307179586 * base ** (index / count))
        smooth = min(max((rotations - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        yield 1 / ((1 - smooth) / factor + smooth)


def _gemma2(file: GgufFile) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": file.option("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.option("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(file, layers_of_27b=46),
    }


def _gemma3(file: GgufFile) -> dict[str, Any]:
    return {
        "sliding_window": file.value("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "rope_theta": file.option("rope.freq_base", 1e6),
        "rope_local_base_freq": file.option("rope.freq_base_swa", 1e4),
        "query_pre_attn_scalar": _query_scalar(file, layers_of_27b=62),
    } | _scaled(file)


def _query_scalar(file: GgufFile, layers_of_27b: int) -> int:
    """Gemma's 27B models divide the width by the heads; the file does not say so."""
    if file.value("block_count") == layers_of_27b:
        return int(file.value("embedding_length") // file.value("attention.head_count"))
    return int(file.value("attention.key_length"))


def _phi3(file: GgufFile) -> dict[str, Any]:
    heads, width = file.value("attention.head_count"), file.value("embedding_length")
    rotated = file.option("rope.dimension_count", width // heads)
    config: dict[str, Any] = {"partial_rotary_factor": rotated * heads / width}
    original = file.option("rope.scaling.original_context_length")
    if original is not None:
        config["original_max_position_embeddings"] = original
    factors = {
        name: tensor.data.tolist()
        for name in ("long", "short")
        if (tensor := file.tensors.get(f"rope_factors_{name}.weight")) is not None
    }
    if factors:
        scaling = {f"{name}_factor": values for name, values in factors.items()}
        config["rope_scaling"] = {"type": "longrope"} | scaling
    return config


ROPE_TENSORS = frozenset(
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)
ARCHITECTURES = {
    "llama": Architecture("llama", PLAIN, _llama),
    "qwen2": Architecture("qwen2", PLAIN, _scaled, frozenset({"attn_q", "attn_k", "attn_v"})),
    "qwen3": Architecture("qwen3", PLAIN | HEAD_NORMS, _scaled),
    "gemma2": Architecture("gemma2", GEMMA, _gemma2, norm_shift=1.0, half="bfloat16"),
    "gemma3": Architecture(
        "gemma3_text", GEMMA | HEAD_NORMS, _gemma3, norm_shift=1.0, half="bfloat16"
    ),
    "phi3": Architecture("phi3", PHI, _phi3),
}
"""Mistral's models call themselves llama. Gemma's activations are too large for float16."""
