"""Converts GGUF files of Llamas with byte-level BPE to MLX folders. Runs as `python -m
mlx_server.models.store.gguf SOURCE FOLDER`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_server.errors import BadRequest

if TYPE_CHECKING:
    import mlx.core as mx
    from tokenizers import Tokenizer

    Arrays = dict[str, mx.array]

REFUSED = 3
"""Exit status for an unsupported file."""
GROUP_SIZE = 32
"""Weights per scale in Q4_0, Q4_1 and Q8_0."""

# `tokenizer.ggml.token_type`
CONTROL_TOKEN = 3
USER_TOKEN = 4

TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [WORDS],
    "smollm": [r"\p{N}", WORDS],
    "llama-bpe": [TIKTOKEN.format(numbers=r"\p{N}{1,3}")],
    "qwen2": [TIKTOKEN.format(numbers=r"\p{N}")],
}
"""Expressions that split a text one after the other."""


def main(arguments: list[str]) -> int:
    source, folder = map(Path, arguments)
    try:
        convert(source, folder)
    except BadRequest as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


def convert(source: Path, folder: Path) -> None:
    """Raises BadRequest for an unsupported file."""
    import mlx.core as mx

    tensors, metadata = _read(source)
    _check_supported(metadata)
    weights = _rename(tensors)
    _match_norms(weights)
    quantization = _quantization(weights)
    config = _model_config(metadata, weights) | _rope_scaling(metadata, tensors)
    if quantization:
        config["quantization"] = quantization
    tokenizer = _tokenizer(metadata)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(folder / "generation_config.json", _token_ids(metadata))
    _write_json(folder / "config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(source: Path) -> tuple["Arrays", dict[str, Any]]:
    import mlx.core as mx

    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadRequest("it is not a GGUF file")
    try:
        loaded: Any = mx.load(str(source), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        # MLX reads legacy and K types only.
        raise BadRequest(f"MLX cannot read it ({error})") from error
    tensors, metadata = loaded
    plain = {
        key: value.tolist() if isinstance(value, mx.array) else value
        for key, value in metadata.items()
    }
    return tensors, plain


def _check_supported(metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise BadRequest(f"its architecture is {architecture!r}; only 'llama' is supported")
    if metadata.get("llama.expert_count", 0):
        raise BadRequest("mixtures of experts are not supported")
    if metadata.get("split.count", 1) > 1:
        raise BadRequest("it is one part of several; join them with gguf-split first")
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise BadRequest(f"its tokenizer is {kind!r}; only byte-level BPE ('gpt2') is supported")
    rule = _pre_tokenizer(metadata)
    if rule not in SPLITS:
        raise BadRequest(f"its pre-tokenizer {rule!r} is none of {', '.join(sorted(SPLITS))}")


# weights


def _rename(tensors: "Arrays") -> "Arrays":
    renamed = {}
    for name, array in tensors.items():
        if name == "rope_freqs.weight":
            continue
        stem, _, kind = name.rpartition(".")
        target = _module_name(stem)
        # `biases` are a quantized layer's offsets; `bias` is its own.
        if target is None or kind not in ("weight", "scales", "biases"):
            raise BadRequest(f"it has a tensor that a Llama model has not: {name}")
        renamed[f"{target}.{kind}"] = array
    return renamed


def _module_name(stem: str) -> str | None:
    match stem.split("."):
        case ["blk", number, part] if number.isdecimal() and part in IN_LAYER:
            return f"model.layers.{number}.{IN_LAYER[part]}"
        case [part]:
            return TOP_LEVEL.get(part)
    return None


def _match_norms(weights: "Arrays") -> None:
    """GGUF's float32 norms would make all activations float32."""
    embedding = "model.embed_tokens"
    like = weights.get(f"{embedding}.scales", weights.get(f"{embedding}.weight"))
    if like is None:
        raise BadRequest("it has no token embedding")
    for name, array in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = array.astype(like.dtype)


def _quantization(weights: "Arrays") -> dict[str, Any]:
    bits = {
        name.removesuffix(".scales"): 32
        * weights[name.replace(".scales", ".weight")].shape[-1]
        // (GROUP_SIZE * scales.shape[-1])
        for name, scales in weights.items()
        if name.endswith(".scales")
    }
    if not bits:
        return {}
    widths = list(bits.values())
    usual = max(set(widths), key=widths.count)
    return {"group_size": GROUP_SIZE, "bits": usual} | {
        module: {"group_size": GROUP_SIZE, "bits": width}
        for module, width in sorted(bits.items())
        if width != usual
    }


# configuration


def _model_config(metadata: dict[str, Any], weights: "Arrays") -> dict[str, Any]:
    def value(key: str) -> Any:
        found = metadata.get(f"llama.{key}")
        if found is None or isinstance(found, list):
            raise BadRequest(f"its metadata has no usable llama.{key}")
        return found

    heads = value("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value("embedding_length"),
        "num_hidden_layers": value("block_count"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", value("embedding_length") // heads),
        # Via decimal text: 1e-5, not the nearest float32.
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "max_position_embeddings": value("context_length"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        # GGUF interleaves the rows of Llama's q and k projections.
        "rope_traditional": True,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    } | _token_ids(metadata)


def _rope_scaling(metadata: dict[str, Any], tensors: "Arrays") -> dict[str, Any]:
    """Llama 3.1 ships each frequency's divisor; mlx-lm wants the formula's parameters."""
    kind = metadata.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        divisors: Any = tensors["rope_freqs.weight"].tolist()
        return {"rope_scaling": _llama3_scaling(divisors, metadata)}
    if kind == "none":
        return {}
    if kind == "linear":
        factor = metadata.get("llama.rope.scaling.factor", 1.0)
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    raise BadRequest(f"its position scaling {kind!r} is not supported")


def _llama3_scaling(divisors: list[float], metadata: dict[str, Any]) -> dict[str, Any]:
    factor = round(max(divisors), 3)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = metadata.get("llama.rope.freq_base", 10000.0)
    expected = list(_llama3_divisors(factor, base, len(divisors)))
    if any(abs(a - b) > 0.01 * b for a, b in zip(divisors, expected, strict=True)):
        raise BadRequest("its rope_freqs are not those of Llama 3's position scaling")
    return scaling


def _llama3_divisors(factor: float, base: float, count: int) -> Iterator[float]:
    """Meta's formula: long wavelengths are stretched by `factor`, short ones not, smoothly."""
    for index in range(count):
        rotations = 8192 / (6.283185307179586 * base ** (index / count))
        smooth = min(max((rotations - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        yield 1 / ((1 - smooth) / factor + smooth)


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    found = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: value for name, value in found.items() if value is not None}


# tokenizer


def _pre_tokenizer(metadata: dict[str, Any]) -> str:
    rule = str(metadata.get("tokenizer.ggml.pre", "default"))
    return "llama-bpe" if rule in ("llama3", "llama-v3") else rule


def _adds_bos(metadata: dict[str, Any]) -> bool:
    # Llama 3 files that omit it mean yes.
    return bool(
        metadata.get("tokenizer.ggml.add_bos_token", _pre_tokenizer(metadata) == "llama-bpe")
    )


def _tokenizer(metadata: dict[str, Any]) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    rule = _pre_tokenizer(metadata)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=rule == "llama-bpe",
        )
    )
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split_rule(rule)
    tokenizer.decoder = decoders.ByteLevel()
    if _adds_bos(metadata):
        tokenizer.post_processor = _bos_in_front(metadata)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == CONTROL_TOKEN:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_TOKEN:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _split_rule(rule: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits: list[Any] = [Split(Regex(expression), "isolated") for expression in SPLITS[rule]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _bos_in_front(metadata: dict[str, Any]) -> Any:
    from tokenizers.processors import TemplateProcessing

    token = _named_token(metadata, "bos")
    if token is None:
        raise BadRequest("its metadata names no beginning-of-text token, and asks to add it")
    identity = metadata["tokenizer.ggml.bos_token_id"]
    return TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, identity)]
    )


def _named_token(metadata: dict[str, Any], name: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    return tokens[index] if index is not None and index < len(tokens) else None


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    texts = {key: _named_token(metadata, name) for name, key in names.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
        "add_prefix_space": False,
        "model_max_length": metadata.get("llama.context_length"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    } | texts
    return {key: value for key, value in config.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
