"""A tiny configuration of every architecture of mlx-lm, and models with random weights of them.

`ARCHITECTURES` maps a name to its config.json. mlx-lm's argument classes take what they know of a
configuration and ignore the rest, so one table of usual values serves all; each architecture adds
what it alone has, and what makes a tiny model exercise it: several kinds of layers, more than one
expert, windows shorter than the prompts of the tests.

Left out: bitnet and muse_spark, whose kernels are Metal's only; prism_hadamard_qwen35, a format of
packed 2-bit weights; and two that mlx-lm computes wrongly by themselves: olmo, which adds the word
"causal" to its scores, and phi3small, which adds true and false to them and writes beyond a
vocabulary of less than 100,352.
"""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

VOCAB_SIZE = 128
CONTEXT = 512
WINDOW = 16
LAYERS = 4

USUAL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "sliding_window": WINDOW,
    # mixtures of experts
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state spaces and other recurrences
    "conv_kernel": 4,
    "use_conv_bias": True,
    "n_groups": 1,
    "time_step_limit": (0.0, float("inf")),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
}

WINDOWED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
"""Kinds of the layers where a model alternates between windows and the whole context."""

_ALL_HEADS = {"num_key_value_heads": 4}
_SPARSE_INDEX = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_LLAMA_4_SCALING = {
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 64,
}

OWN: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {
        "hidden_dim": 32,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "afmoe": {"layer_types": WINDOWED, "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_v3": {"layer_group_size": 2, "moe_shared_expert_intermediate_size": 32},
    "cohere": {},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "max_seq_len": CONTEXT,
    },
    "deepseek": {},
    "deepseek_v2": _ALL_HEADS
    | {
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": CONTEXT // 2,
        },
    },
    "deepseek_v3": _ALL_HEADS,
    "deepseek_v32": _ALL_HEADS | _SPARSE_INDEX,
    "deepseek_v41": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone": {"num_layers": 4},
    "exaone4": {"rope_scaling": {"rope_type": "default"}, "sliding_window_pattern": "LG"},
    "exaone_moe": {
        "layer_types": WINDOWED,
        "is_moe_layer": [False, True, True, True],
    },
    "falcon_h1": {
        "mamba_d_head": 8,
        "mamba_d_ssm": 32,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_chunk_size": 16,
    },
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"]},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        "sliding_window_pattern": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_kv_shared_layers": 2,
        "layer_types": WINDOWED,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"rope_scaling": None},
    "glm4_moe_lite": _ALL_HEADS,
    "glm_moe_dsa": _ALL_HEADS | _SPARSE_INDEX | {"rope_parameters": {"rope_theta": 10000.0}},
    "gpt2": _ALL_HEADS
    | {"n_ctx": CONTEXT, "n_positions": CONTEXT, "n_embd": 32, "n_head": 4, "n_layer": 4},
    "gpt_bigcode": {
        "n_positions": CONTEXT,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 4,
        "n_inner": 64,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gpt_neox": _ALL_HEADS | {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": WINDOWED},
    "gptj": {"n_positions": CONTEXT, "n_embd": 32, "n_head": 4, "n_layer": 4, "rotary_dim": 4},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "granitemoe": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "granitemoehybrid": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    },
    "helium": {},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan_v1_dense": {},
    "internlm2": {"bias": False},
    "internlm3": {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        "model_max_length": CONTEXT,
        "num_experts_per_token": 2,
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
    },
    "laguna": {"layer_types": WINDOWED, "mlp_layer_types": ["dense", "sparse"] * 2},
    "lfm2": {
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "lfm2_moe": {
        "conv_bias": False,
        "conv_L_cache": 3,
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "full_attn_idxs": [1, 3],
    },
    "lille-130m": {
        "block_size": CONTEXT,
        "n_embd": 96,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 4,
    },
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 4,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64},
    "mamba2": {"num_heads": 8, "state_size": 8, "time_step_rank": 4},
    "mellum": {
        "layer_types": WINDOWED,
        "rope_parameters": {kind: {"rope_theta": 10000.0} for kind in WINDOWED},
    },
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": {
        "dim_model_base": 16,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
        "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    },
    "minimax": {"rotary_dim": 4},
    "ministral3": {"layer_types": WINDOWED, "rope_parameters": _LLAMA_4_SCALING},
    "mistral4": _ALL_HEADS | {"rope_parameters": _LLAMA_4_SCALING},
    "mixtral": {},
    "muse_glimmer": {"layer_types": WINDOWED},
    "nanbeige": {"num_loops": 2},
    "nanochat": {"num_key_value_heads": 4},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False},
            },
            {
                "attention": {"n_heads_in_group": None, "no_op": True},
                "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
            },
        ]
        * 2,
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "M", "-"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
    },
    "nemotron_h-moe": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": ["M", "*", "M", "E"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo2": {},
    "olmo3": {"layer_types": WINDOWED},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_allow_neg_eigval": True,
    },
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 4,
        "model_dim": 32,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4, 4, 4],
        "num_kv_heads": [2, 2, 2, 2],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.0],
        "max_context_length": CONTEXT,
    },
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0},
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 4,
            "short_factor": [1.0] * 4,
            "long_mscale": 1.0,
            "short_mscale": 1.0,
        },
        "original_max_position_embeddings": CONTEXT,
    },
    "phixtral": {
        "num_vocab": VOCAB_SIZE,
        "model_dim": 32,
        "num_heads": 4,
        "num_layers": 4,
        "rotary_dim": 4,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "hidden_size_per_head": 8,
        "mamba_d_state": 8,
        "mamba_num_heads": 4,
        "attention_window_size": WINDOW,
    },
    "plamo3": {"window_size": WINDOW, "sliding_window_pattern": 2},
    "qwen": {"kv_channels": 8},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"full_attention_interval": 2},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "solar_open": {},
    "spark2_5": {
        "layer_types": WINDOWED,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            "full_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "stablelm": {},
    "starcoder2": {},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": WINDOWED,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2,3",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
    "talkie": {"num_key_value_heads": 4},
    "telechat3": {},
    "youtu_llm": _ALL_HEADS,
}
"""What each architecture has beside, or instead of, the usual."""


def _nested(text: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {"text_config": USUAL | text} | own


NESTED: dict[str, dict[str, Any]] = {
    "gemma3": _nested({"model_type": "gemma3_text"} | OWN["gemma3_text"]),
    "gemma3n": _nested(
        {
            "model_type": "gemma3n_text",
            "layer_types": WINDOWED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 2,
            "altup_num_inputs": 2,
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "laurel_rank": 8,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
            "query_pre_attn_scalar": 8,
            "rope_scaling": None,
        }
    ),
    "gemma4": _nested({"model_type": "gemma4_text"} | OWN["gemma4_text"], vocab_size=VOCAB_SIZE),
    "kimi_k25": _nested({"model_type": "kimi_k25"} | OWN["deepseek_v3"]),
    "kimi_k3": _nested(
        OWN["kimi_linear"] | {"attn_res_block_size": 2, "mla_use_output_gate": True}
    ),
    "kimi_vl": _nested({"model_type": "deepseek_v3"} | OWN["deepseek_v3"]),
    "lfm2-vl": _nested({"model_type": "lfm2"} | OWN["lfm2"]),
    "llama4": _nested(
        {
            "model_type": "llama4_text",
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "rope_scaling": None,
            "num_experts_per_tok": 1,
        }
    ),
    "minimax_m3_vl": _nested(
        {
            "dense_intermediate_size": 64,
            "moe_layer_freq": [0, 1, 1, 1],
            "intermediate_size": 32,
        }
    ),
    "mistral3": _nested({"model_type": "mistral"}),
    "pixtral": _nested({"model_type": "mistral"}),
    "qwen2_vl": _nested({"model_type": "qwen2"}),
    "qwen3_5": _nested({"full_attention_interval": 2}),
    "qwen3_5_moe": _nested({"full_attention_interval": 2}),
    "qwen3_vl": _nested({"model_type": "qwen3"}),
    "qwen3_vl_moe": _nested({"model_type": "qwen3_moe"}),
}
"""Multimodal models, of which mlx-lm computes the text part."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {"model_type": name} | USUAL | own for name, own in OWN.items()},
    **{name: {"model_type": name} | own for name, own in NESTED.items()},
}


def own_config(name: str) -> dict[str, Any]:
    """Its config.json without the usual values that its argument class does not know."""
    config = ARCHITECTURES[name]
    if name not in OWN:
        return config
    _, arguments = _get_classes(config)
    known = USUAL.keys() & inspect.signature(arguments).parameters
    kept = {"model_type", *OWN[name], *known}
    return {key: value for key, value in config.items() if key in kept}


def build_architecture(
    folder: Path, name: str, seed: int = 0, kind: mx.Dtype = mx.float32, **more: Any
) -> Path:
    """Write a random model of `ARCHITECTURES[name]` to `folder`, without a text side; `more` goes
    into its config.
    """
    folder.mkdir(parents=True)
    config = ARCHITECTURES[name] | more
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {
        name: weight.astype(kind) if weight.dtype == mx.float32 else weight
        for name, weight in random_weights(config, seed).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def random_weights(config: dict[str, Any], seed: int) -> dict[str, mx.array]:
    """Weights under which every layer has a say: matrices are scaled to keep their inputs' size.

    Vectors stay as the model makes them, since they are norms, decays and biases.
    """
    mx.random.seed(seed)
    return with_random_matrices(dict(tree_flatten(model_of(config).parameters())), seed)


def model_of(config: dict[str, Any]) -> Any:
    """As mlx-lm makes it."""
    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(copy.deepcopy(config)))  # some change it


def with_random_matrices(weights: dict[str, mx.array], seed: int) -> dict[str, mx.array]:
    weights = dict(weights)
    keys = mx.random.split(mx.random.key(seed), max(2, len(weights)))
    for key, (name, weight) in zip(keys, sorted(weights.items()), strict=False):
        if weight.ndim >= 2 and weight.dtype in (mx.float32, mx.float16, mx.bfloat16):
            scale = 1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5
            weights[name] = mx.random.normal(weight.shape, scale=scale, key=key)
    return weights
