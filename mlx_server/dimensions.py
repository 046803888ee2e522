"""What a model's config.json says of its sizes, for the front and the engine alike.

The names are those of all architectures that mlx-lm computes. Of a multimodal model the text part
counts.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Config = Mapping[str, Any]
Names = tuple[str, ...]
Division = Literal["auto", "tensor", "pipeline"]
Way = Literal["tensor", "pipeline"]
"""How ranks share a model: a part of each layer for each, or whole layers."""

TEXT_PARTS = ("text_config", "llm_config", "language_config")
INNER_PARTS = ("attn_config", "ffn_config")

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
LOOPS = ("num_loops", "loop_num")
"""How often a token passes the layers, each time with a cache of its own."""
WIDTH = ("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim")
INNER_WIDTH = ("intermediate_size", "n_inner", "ffn_hidden_size", "mlp_hidden_size")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "kv_n_heads")
HEAD = ("head_dim", "kv_channels", "hidden_size_per_head")
DIVIDED: dict[str, Names] = {
    "attention heads": HEADS,
    "key and value heads": KV_HEADS,
    "linear key heads": ("linear_num_key_heads",),
    "linear value heads": ("linear_num_value_heads",),
    "inner dimensions": INNER_WIDTH,
    "inner dimensions of an expert": ("moe_intermediate_size",),
    "inner dimensions of shared experts": ("shared_expert_intermediate_size",),
}
"""Of which each rank of a divided model gets an equal number. mlx-lm does not check it."""
LAYERED = frozenset(
    {
        *("bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe"),
        *("glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash", "kimi_k2", "kimi_k25"),
        *("minimax_m3_vl", "ministral3", "mistral4", "qwen2", "qwen3_5", "qwen3_5_moe"),
        *("qwen3_moe", "qwen3_next", "solar_open"),
    }
)
"""Types of models whose layers mlx-lm can deal out to ranks (`pipeline`), and one after the other
computes from one state. Of deepseek_v41 and kimi_k3 later layers read what earlier ones have made;
muse_spark runs on Metal alone, where none of this has been tried.
"""
LAYERED_ONLY = frozenset({"bailing_hybrid", "qwen3_next"})
"""Those of which it cannot divide each layer (`shard`)."""
VOCABULARY = ("vocab_size", "num_vocab")
CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_context_length",
    "model_max_length",
    "seq_length",
    "seq_len",
)
OWN_CONTEXT = {"lille-130m": "block_size"}
"""Names that mean something else in other families."""

HEADED: dict[str, str] = {
    **dict.fromkeys(
        ("nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_moe"),
        r"((model\.)?language_model\.|model\.)?mtp\.",
    ),
    **dict.fromkeys(
        (
            *("bailing_hybrid", "bailing_moe", "bailing_moe_v3", "deepseek_v3", "deepseek_v32"),
            *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "step3p5"),
        ),
        r"model\.layers\.LAYERS\.",
    ),
    "ernie4_5_moe": r"model\.mtp_(?=(block|emb_norm|hidden_norm|linear_proj)\.)",
    "exaone_moe": r"mtp\.",
    "longcat_flash": r"model\.mtp\.",
    "mimo": r"model\.mtp_layers\.",
    "mimo_v2_flash": r"model\.mtp\.layers\.",
}
"""Families with a head of their own that guesses further tokens, where the engine can use it: what
the names of its weights begin with. LAYERS stands for how many layers the model has.
"""
HEAD_REPEATS = re.compile(r"(embed_tokens|shared_head\.head)\.")
"""What follows in names of weights that a head shares with its model, and that are there twice."""

UNKNOWN_CONTEXT = 4096
RECURRENT = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv7", "recurrent_gemma"})
"""Their memory is a state of fixed size."""
NO_LIMIT = 1 << 20
"""A recurrent model could go on for ever, but an answer shall end."""
LARGEST_CONTEXT = 1 << 30
FAMILY_CONTEXT = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), 1024),
    **dict.fromkeys(("dbrx", "deepseek", "deepseek_v2", "dots1", "exaone", "exaone4"), 2048),
    **dict.fromkeys(("bitnet", "exaone_moe", "gpt_neox", "gptj", "hunyuan_v1_dense"), 2048),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "llama", "llava"), 2048),
    **dict.fromkeys(("minicpm", "nanochat", "olmo", "olmo2", "olmo3", "openelm", "phi"), 2048),
    **dict.fromkeys(("phi-msft", "phixtral", "plamo", "plamo2", "plamo3", "talkie"), 2048),
    **dict.fromkeys(("deepseek_v3", "helium", "kimi_k2", "kimi_k25", "kimi_vl"), 4096),
    **dict.fromkeys(("nemotron", "nemotron_h", "olmoe", "phi3", "stablelm", "starcoder2"), 4096),
    **dict.fromkeys(("cohere", "cohere2", "falcon_h1", "gemma", "gemma2", "phi3small"), 8192),
    **dict.fromkeys(("qwen", "spark2_5"), 8192),
    "afmoe": 16384,
    **dict.fromkeys(("baichuan_m1", "gemma3", "gemma3n", "internlm2", "internlm3"), 32768),
    **dict.fromkeys(("mimo", "minicpm3", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl"), 32768),
    **dict.fromkeys(("qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next"), 32768),
    **dict.fromkeys(("prism_hadamard_qwen35", "smollm3"), 32768),
    **dict.fromkeys(("apertus", "olmo_hybrid"), 65536),
    **dict.fromkeys(("lfm2", "lfm2-vl", "lfm2_moe", "qwen3_vl", "qwen3_vl_moe"), 128000),
    "step3p5": 128000,
    **dict.fromkeys(("bailing_moe_v3", "ernie4_5", "ernie4_5_moe", "gemma4", "glm"), 131072),
    **dict.fromkeys(("glm4", "glm4_moe", "gpt_oss", "iquestcoder", "iquestloopcoder"), 131072),
    **dict.fromkeys(("laguna", "llama4", "longcat_flash", "mellum", "mimo_v2_flash"), 131072),
    **dict.fromkeys(("minimax", "mistral", "mistral3", "mixtral", "muse_glimmer"), 131072),
    **dict.fromkeys(("nemotron-nas", "phimoe", "pixtral", "solar_open", "youtu_llm"), 131072),
    "deepseek_v32": 163840,
    "minimax_m2": 196608,
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa"), 202752),
    **dict.fromkeys(("bailing_hybrid", "gemma4_unified", "jamba", "ministral3"), 262144),
    **dict.fromkeys(("minimax_m3_vl", "seed_oss"), 524288),
    **dict.fromkeys(("deepseek_v41", "kimi_k3", "kimi_linear", "mistral4", "muse_spark"), 1 << 20),
}
"""Where config.json says nothing, for transformers leaves out what its class has as default (of the
text part of a multimodal model); for families that only mlx-lm has, its default.
"""
STRETCHED_CONTEXT = {"gemma3": 131072}
"""Where config.json says nothing but that positions are rescaled, which these models were trained
with.
"""


def context_length(config: Config) -> int:
    """In tokens; a guess for a family that is not known and does not say."""
    known = families(config)
    if RECURRENT.intersection(known):
        return NO_LIMIT
    own = tuple(OWN_CONTEXT[family] for family in known if family in OWN_CONTEXT)
    for part in _parts(config):
        stated = [length for name in (*own, *CONTEXT) if (length := _length(part.get(name)))]
        if longest := max(min(stated, default=0), _yarn_length(part)):
            return longest
    rescaled = any(_is_rescaled(part) for part in _parts(config))
    for family in known:
        if rescaled and family in STRETCHED_CONTEXT:
            return STRETCHED_CONTEXT[family]
        if family in FAMILY_CONTEXT:
            return FAMILY_CONTEXT[family]
    return UNKNOWN_CONTEXT


def number(config: Config, names: Iterable[str], default: int = 0) -> int:
    """The first of `names` with a whole number; of a list, which has one per layer, the largest."""
    for part in _parts(config):
        for name in names:
            value = part.get(name)
            if isinstance(value, list):
                value = max((one for one in value if type(one) is int), default=None)
            if type(value) is int and value >= 0:
                return value
    return default


def uneven_parts(config: Config, ranks: int) -> str | None:
    """Why so many ranks cannot have equal parts of the model, if they cannot."""
    counts = {what: count for what, names in DIVIDED.items() if (count := number(config, names))}
    uneven = [f"{count} {what}" for what, count in counts.items() if count % ranks]
    if not uneven:
        return None
    common = math.gcd(*counts.values())
    fitting = [str(n) for n in range(2, common + 1) if common % n == 0]
    hint = f"; it can be divided among {' or '.join(fitting)}" if fitting else ""
    return f"{ranks} ranks cannot share its {' and '.join(uneven)}{hint}"


def uneven_layers(config: Config, ranks: int) -> str | None:
    """Why so many ranks cannot each have some of the model's layers, if they cannot."""
    kind, layers = str(config.get("model_type")), number(config, LAYERS)
    if kind not in LAYERED:
        return f"models of type {kind} cannot be divided by layers"
    return f"{ranks} ranks cannot share its {layers} layers" if layers < ranks else None


def division(
    config: Config, ranks: int, wanted: Division, *, shards: bool | None = None
) -> tuple[Way, str | None]:
    """How a model is divided among ranks, and why it cannot be, if it cannot.

    `shards`: mlx-lm can divide each layer; None goes by the model's type.
    """
    kind = str(config.get("model_type"))
    parts, layers = uneven_parts(config, ranks), uneven_layers(config, ranks)
    if shards is None:
        shards = kind not in LAYERED_ONLY
    if not shards:
        parts = f"mlx-lm has no way to divide models of type {kind} among {ranks} ranks by heads"
    if wanted == "pipeline" or (wanted == "auto" and parts is not None and layers is None):
        return "pipeline", layers
    if wanted == "auto" and parts is not None:
        return "tensor", f"{parts}; {layers}"
    return "tensor", parts


def layers_of_ranks(layers: int, ranks: int) -> list[range]:
    """As mlx-lm deals out layers: rank 0 gets the last ones, and the first ranks one more."""
    base, extra = divmod(layers, ranks)
    found, end = [], layers
    for rank in range(ranks):
        start = end - base - (rank < extra)
        found.append(range(start, end))
        end = start
    return found


def head_weights(config: Config) -> re.Pattern[str] | None:
    """What the names of the weights of such a head begin with, None where the family has none."""
    beginning = next((HEADED[kind] for kind in families(config) if kind in HEADED), None)
    if beginning is None:
        return None
    return re.compile(beginning.replace("LAYERS", str(number(config, LAYERS) or "unknown")))


def families(config: Config) -> list[str]:
    """Its `model_type`, that of its text part first."""
    types = (part.get("model_type") for part in (text_part(config), config))
    return [kind.removesuffix("_text") for kind in types if isinstance(kind, str)]


def text_part(config: Config) -> Config:
    """`config` itself of a model of text alone."""
    return next(_parts(config))


def _parts(config: Config) -> Iterator[Config]:
    whole = (*(config.get(name) for name in TEXT_PARTS), config)
    for part in whole:
        if isinstance(part, Mapping):
            yield part
            inner = (part.get(name) for name in INNER_PARTS)
            yield from (one for one in inner if isinstance(one, Mapping))


def _length(value: Any) -> int:
    """0 for what is none."""
    return value if type(value) is int and 0 < value <= LARGEST_CONTEXT else 0


def _yarn_length(part: Config) -> int:
    """Of YaRN, which is also switched on by hand without a change of the length beside it."""
    longest = 0
    for rope in _ropes(part):
        factor, original = rope.get("factor"), _length(rope.get("original_max_position_embeddings"))
        kind = rope.get("rope_type") or rope.get("type")
        if kind == "yarn" and isinstance(factor, int | float) and math.isfinite(factor):
            longest = max(longest, _length(round(factor * original)))
    return longest


def _is_rescaled(part: Config) -> bool:
    return any("factor" in rope for rope in _ropes(part))


def _ropes(part: Config) -> Iterator[Config]:
    """Settings of positions: one for all layers, or one for each kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := part.get(name), Mapping):
            yield rope
            yield from (one for one in rope.values() if isinstance(one, Mapping))
