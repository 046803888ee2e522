"""Tiny models made on the spot: mlx-lm's real architectures and real tokenizers, random weights.

`build_tiny_model` makes one whose output is arbitrary; `build_scripted_model` one that says a
given text and then a given stop token. Both write a folder such as a hub repository holds.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_model
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.support import harmony
from tests.support.templates import PUBLISHED, Published

VOCAB_SIZE = 512
FAMILY_TEMPLATE = "the family's own"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! How are you today? I am fine.",
    "A server answers requests; a client asks questions. The capital of France is Paris.",
    "def main(argument): return [value for value in range(10) if value % 2 == 0]\n",
    "One two three four five six seven eight nine ten eleven twelve thirteen fourteen.\n\n",
    'The answer is {"name": "weather", "arguments": {"city": "Berlin"}}, as was asked.',
    "system user assistant model tool message conversation\n",
    "Für naïve Gäste: café, façade, größer, Äpfel. 日本語と中文。 Привет, мир!",
] * 3


@dataclass(frozen=True)
class Family:
    """What makes a tiny model look like one of its family."""

    architecture: dict[str, Any]
    make_tokenizer: Callable[["Family", tuple[str, ...]], Tokenizer]
    special_tokens: tuple[str, ...]
    template: str | list[dict[str, str]]
    eos: tuple[str, ...]
    """End-of-sequence tokens: the first is the tokenizer's, all are generation_config.json's."""
    bos: str | None = None
    plain_tokens: tuple[str, ...] = ()
    """Whole tokens that are not special."""
    tokenizer_config: dict[str, Any] = field(default_factory=dict)


def build_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    context: int = 2048,
    layers: int = 2,
    hidden: int = 32,
    extra_tokens: Sequence[str] = (),
    omit_tokens: Sequence[str] = (),
    template: str | None = FAMILY_TEMPLATE,
    **architecture: Any,
) -> Path:
    """Write a random model to `folder` and return it. The same arguments give the same weights.

    `architecture` goes into its config, in place of the family's. `extra_tokens` join the
    vocabulary as whole tokens that are not special (`<think>`, say); `omit_tokens` are tokens of
    the family that it shall lack; `template` None leaves the chat template out. Special tokens are
    unlikely, so that an answer rarely ends by itself.
    """
    tokenizer = _tokenizer(family, tuple(extra_tokens), tuple(omit_tokens))
    save_text_side(folder, family, tokenizer, template)
    config = write_config(folder, family, tokenizer, context, layers, hidden, **architecture)
    save_weights(folder, _random_weights(config, _special_ids(tokenizer), seed))
    return folder


def build_quantized(model: Path, folder: Path, *, bits: int, group_size: int = 64) -> Path:
    """Write the model's quantized form to `folder`, without its text side, and return it.

    Raises ValueError where it has no whole groups.
    """
    made, config = load_model(model)
    made, config = quantize_model(made, config, group_size=group_size, bits=bits)
    folder.mkdir(exist_ok=True)
    save_model(folder, made)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build_scripted_model(
    folder: Path,
    text: str,
    *,
    family: str = "llama",
    stop: str | None = None,
    context: int = 2048,
    extra_tokens: Sequence[str] = (),
    template: str | None = FAMILY_TEMPLATE,
) -> Path:
    """Write a model to `folder` that answers every prompt with `text` and then `stop`.

    All that the model looks at is the last token, so no token can come twice in the script: where
    the tokenizer's own way to cut `text` repeats one, the vocabulary gains a longer piece that no
    prompt is ever encoded to. Raises ValueError where that cannot be done: characters with a byte
    in common, in the families with byte fallback. Whatever token is not part of the script
    starts it, so a prompt must not end in one that is; after `stop` (the family's first
    end-of-sequence token by default) the script begins again. The script's tokens have all the
    probability at any temperature.
    """
    tokenizer = _tokenizer(family, tuple(extra_tokens), ())
    pieces = _unrepeated(_pieces(tokenizer, text))
    tokenizer = with_pieces(tokenizer, pieces, KINDS[family])
    save_text_side(folder, family, tokenizer, template)
    script = [*pieces, stop or KINDS[family].eos[0]]
    hidden = 32 * (len(script) // 32 + 1)
    config = write_config(folder, family, tokenizer, context, 2, hidden)
    save_weights(
        folder, _scripted_weights(config, [token_id(tokenizer, piece) for piece in script])
    )
    return folder


def build_recurrent_model(folder: Path, *, seed: int = 0) -> Path:
    """Write to `folder` a random model that mixes attention with recurrent layers; no text side."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "lfm2",
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    }
    _write_json(folder / "config.json", config)
    mx.random.seed(seed)
    save_weights(folder, _weights_of(config))
    return folder


def build_tiny_adapter(base: Path, folder: Path, *, seed: int = 1, kind: str = "lora") -> Path:
    """Write random LoRA weights for the model in `base` to `folder`, as mlx-lm's trainer does.
    `kind` may be `dora`.
    """
    lora = {"rank": 4, "scale": 10.0, "dropout": 0.1}
    model, _ = load_model(base)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), lora, use_dora=kind == "dora")
    shapes = {name: weight.shape for name, weight in tree_flatten(model.trainable_parameters())}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = {
        name: 0.1 * mx.random.normal(shape, key=key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": len(model.layers), "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tiny_tokenizer(family: str = "llama", *, extra_tokens: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer as `build_tiny_model` writes it."""
    return _tokenizer(family, tuple(extra_tokens), ())


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of the token that the vocabulary calls `name`. Raises ValueError if none does."""
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ValueError(f"no token {name!r}")
    return found


# files


def save_text_side(folder: Path, family: str, tokenizer: Tokenizer, template: str | None) -> None:
    kind = KINDS[family]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": kind.bos,
        "eos_token": kind.eos[0],
        "clean_up_tokenization_spaces": False,
        **kind.tokenizer_config,
    }
    if template is not None:
        config["chat_template"] = kind.template if template == FAMILY_TEMPLATE else template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)


def write_config(
    folder: Path,
    family: str,
    tokenizer: Tokenizer,
    context: int,
    layers: int,
    hidden: int,
    **architecture: Any,
) -> dict[str, Any]:
    kind = KINDS[family]
    ends = [i for name in kind.eos if (i := tokenizer.token_to_id(name)) is not None]
    config = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "5.0.0",
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
        "bos_token_id": tokenizer.token_to_id(kind.bos) if kind.bos else None,
        "eos_token_id": ends[0],
        **kind.architecture,
        **architecture,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return config


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


# weights


def _weights_of(config: dict[str, Any]) -> dict[str, mx.array]:
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    return dict(tree_flatten(model.parameters()))


def _random_weights(config: dict[str, Any], special: list[int], seed: int) -> dict[str, mx.array]:
    weights = _weights_of(config)
    keys = mx.random.split(mx.random.key(seed), len(weights))
    for key, (name, weight) in zip(keys, sorted(weights.items()), strict=True):
        if weight.ndim == 2:
            inputs = 1 if name.endswith("embed_tokens.weight") else weight.shape[1]
            weights[name] = mx.random.normal(weight.shape, scale=2 * inputs**-0.5, key=key)
    weights["lm_head.weight"][mx.array(special)] = 0
    return weights


def _scripted_weights(config: dict[str, Any], script: list[int]) -> dict[str, mx.array]:
    """Layers that add nothing, and one dimension per position of the script.

    The embedding of `script[i]` is the unit vector `i + 1`, that of all other tokens the unit
    vector 0; the output row of `script[i]` is the unit vector `i`, scaled to win clearly.
    """
    weights = _nothing(config)
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0] = 1
    for position, token in enumerate(script):
        head[token, position] = 20
    for position, token in enumerate(script[:-1]):
        embedding[token, 0] = 0
        embedding[token, position + 1] = 1
    return weights


def chained_weights(
    config: dict[str, Any], chains: list[list[int]], end: int
) -> dict[str, mx.array]:
    """Layers that add nothing; the first token of a chain leads to its second, and so on, and the
    last to `end`, as does every token in none. The dimensions are as in `_scripted_weights`.
    """
    weights = _nothing(config)
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0] = 1
    head[end, 0] = 20
    position = 1
    for chain in chains:
        for token, successor in pairwise((*chain, end)):
            embedding[token, 0] = 0
            embedding[token, position] = 1
            head[successor, position] = 20
            position += 1
    return weights


def _nothing(config: dict[str, Any]) -> dict[str, mx.array]:
    weights = _weights_of(config)
    for name, weight in weights.items():
        if weight.ndim >= 2 or name.endswith("bias"):
            weights[name] = mx.zeros_like(weight)
    return weights


def save_weights(folder: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


# scripts


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """`text` as the tokenizer cuts it, without a space that it puts in front."""
    pieces: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    if pieces[0].startswith("▁") and not text.startswith(" "):
        pieces[0] = pieces[0][1:]
    return [piece for piece in pieces if piece]


def _unrepeated(pieces: list[str]) -> list[str]:
    """Append each piece that came before to the one in front of it, until the whole is new."""
    result: list[str] = []
    for piece in pieces:
        while piece in result:
            if _is_byte(piece) or _is_byte(result[-1]):
                raise ValueError(f"a script cannot repeat {piece} here: {pieces}")
            piece = result.pop() + piece
        result.append(piece)
    return result


def _is_byte(piece: str) -> bool:
    return piece.startswith("<0x") and len(piece) == len("<0x00>")


def with_pieces(tokenizer: Tokenizer, pieces: list[str], kind: Family) -> Tokenizer:
    """A copy whose vocabulary has all of `pieces`; new ones have no merges that lead to them."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    size = len(vocab)
    new = [piece for piece in pieces if tokenizer.token_to_id(piece) is None]
    vocab |= {piece: size + i for i, piece in enumerate(new)}
    for token in content["added_tokens"]:
        token["id"] += len(new) if token["id"] >= size else 0
    longer = Tokenizer.from_str(json.dumps(content))
    _prepend_bos(longer, kind)
    return longer


# tokenizers


@lru_cache(maxsize=32)
def _tokenizer(family: str, extra: tuple[str, ...], omit: tuple[str, ...]) -> Tokenizer:
    kind = KINDS[family]
    tokenizer = kind.make_tokenizer(kind, omit)
    plain = [name for name in (*kind.plain_tokens, *extra) if name not in omit]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    return tokenizer


def _specials(kind: Family, omit: tuple[str, ...]) -> list[AddedToken]:
    names = [name for name in kind.special_tokens if name not in omit]
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    return [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def _byte_level(kind: Family, omit: tuple[str, ...]) -> Tokenizer:
    """GPT-2's way: every byte is a character of the vocabulary; special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(_specials(kind, omit))
    _prepend_bos(tokenizer, kind)
    return tokenizer


def _sentencepiece(kind: Family, omit: tuple[str, ...]) -> Tokenizer:
    """SentencePiece's way, with `▁` in front of a text: pieces of characters, bytes as fallback."""
    tokenizer = _metaspace(kind, omit)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _sentencepiece_bare(kind: Family, omit: tuple[str, ...]) -> Tokenizer:
    """SentencePiece's way without a space put in front."""
    tokenizer = _metaspace(kind, omit)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _metaspace(kind: Family, omit: tuple[str, ...]) -> Tokenizer:
    specials = _specials(kind, omit)
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    vocab = {name: i for i, name in enumerate([*(t.content for t in specials), *byte_tokens])}
    trained = _train_pieces()
    for piece in sorted(trained["vocab"], key=trained["vocab"].__getitem__):
        vocab.setdefault(piece, len(vocab))
    merges = [(left, right) for left, right in trained["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(specials)
    _prepend_bos(tokenizer, kind)
    return tokenizer


@lru_cache(maxsize=1)
def _train_pieces() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _prepend_bos(tokenizer: Tokenizer, kind: Family) -> None:
    if kind.bos is None:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[kind.bos, "$A"],
        pair=[kind.bos, "$A", kind.bos, "$B"],
        special_tokens=[(kind.bos, tokenizer.token_to_id(kind.bos))],
    )


# families

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
{{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

QWEN_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set tool_call = call.function %}
{{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set system = '' %}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message.role == 'user' %}
{{- '[INST] ' + (system if loop.last else '') + message.content + ' [/INST]' }}
{%- else %}
{{- ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""

GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}"""

PHI_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- else %}
{{- eos_token }}
{%- endif %}"""

GENERIC_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""

FAMILIES = {
    "llama": Family(
        architecture={"model_type": "llama"},
        make_tokenizer=_byte_level,
        special_tokens=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        template=LLAMA_TEMPLATE,
        bos="<|begin_of_text|>",
        eos=("<|end_of_text|>",),
    ),
    "qwen": Family(
        architecture={"model_type": "qwen3"},
        make_tokenizer=_byte_level,
        special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain_tokens=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        template=QWEN_TEMPLATE,
        eos=("<|im_end|>", "<|endoftext|>"),
    ),
    "mistral": Family(
        architecture={"model_type": "mistral"},
        make_tokenizer=_sentencepiece,
        special_tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        template=MISTRAL_TEMPLATE,
        bos="<s>",
        eos=("</s>",),
        tokenizer_config={"unk_token": "<unk>"},
    ),
    "gemma": Family(
        architecture={
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 8,
            "sliding_window": 64,
            "sliding_window_pattern": 2,
        },
        make_tokenizer=_sentencepiece_bare,
        special_tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        template=GEMMA_TEMPLATE,
        bos="<bos>",
        eos=("<eos>",),
        tokenizer_config={"unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "phi": Family(
        architecture={"model_type": "phi3"},
        make_tokenizer=_byte_level,
        special_tokens=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        template=PHI_TEMPLATE,
        eos=("<|endoftext|>",),
    ),
    "generic": Family(
        architecture={
            "model_type": "stablelm",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": False,
        },
        make_tokenizer=_byte_level,
        special_tokens=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"),
        template=GENERIC_TEMPLATE,
        eos=("<|endoftext|>",),
    ),
}

# families with their newer templates: tools, and blocks of thinking

MISTRAL_TOOL_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + ({'content': message.content} | tojson) + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{{- call.function | tojson + (', ' if not loop.last else ']') }}
{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content + eos_token }}
{%- else %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- endif %}
{%- endfor %}"""

HEADERS_TEMPLATE = MISTRAL_TOOL_TEMPLATE.replace("{{- '[TOOL_CALLS] [' }}\n", "").replace(
    "{{- call.function | tojson + (', ' if not loop.last else ']') }}",
    "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}",
)

MISTRAL_TOKENS = (
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)

PHI_TOOL_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
{{- '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}
{%- else %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% else %}{{- eos_token }}{% endif %}"""

GEMMA_TOOL_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{- '<|turn>system\n' + (tools | tojson) + '<turn|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + (call.function.arguments | tojson) }}
{{- '<tool_call|>' }}
{%- endfor %}
{{- '<turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\n' }}{% endif %}"""

FUNCTION_GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<start_of_turn>developer\n' }}
{%- for tool in tools %}{{- tool | tojson }}{% endfor %}
{{- '<end_of_turn>\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<start_function_call>call:' + call.function.name + '{}<end_function_call>' }}
{%- endfor %}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

QWEN_CODER_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- for tool in tools %}{{- tool | tojson + '\n' }}{% endfor %}
{{- 'Answer with\n<tool_call>\n<function=name>\n...</function>\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\n' + (value | string) + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

OPEN_THINKING_TEMPLATE = QWEN_TEMPLATE.replace(
    "{{- '<think>\\n\\n</think>\\n\\n' }}\n{%- endif %}",
    "{{- '<think>\\n\\n</think>\\n\\n' }}\n{%- else %}\n{{- '<think>\\n' }}\n{%- endif %}",
)


def _variant(family: str, template: str, tokens: tuple[str, ...] = ()) -> Family:
    kind = FAMILIES[family]
    specials = (*kind.special_tokens, *tokens)
    return replace(kind, template=template, special_tokens=specials)


VARIANTS = {
    "mistral-tools": _variant("mistral", MISTRAL_TOOL_TEMPLATE, MISTRAL_TOKENS),
    "mistral-headers": _variant(
        "mistral", HEADERS_TEMPLATE, (*MISTRAL_TOKENS, "[ARGS]", "[THINK]", "[/THINK]")
    ),
    "phi-tools": _variant(
        "phi",
        PHI_TOOL_TEMPLATE,
        ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
    ),
    "gemma-tools": _variant(
        "gemma",
        GEMMA_TOOL_TEMPLATE,
        ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
    ),
    "function-gemma": _variant(
        "gemma",
        FUNCTION_GEMMA_TEMPLATE,
        (
            "<start_function_call>",
            "<end_function_call>",
            "<escape>",
        ),
    ),
    "gpt-oss": Family(
        architecture={
            "model_type": "gpt_oss",
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_theta": 150000.0,
        },
        make_tokenizer=_byte_level,
        special_tokens=harmony.SPECIAL_TOKENS,
        template=harmony.TEMPLATE,
        eos=("<|return|>", "<|call|>", "<|endoftext|>"),
    ),
    "qwen-coder": _variant("qwen", QWEN_CODER_TEMPLATE),
    "qwen-thinking": _variant("qwen", OPEN_THINKING_TEMPLATE),
}
"""Families once more, as later models of theirs speak."""


def _published(one: Published) -> Family:
    return Family(
        architecture={"model_type": "llama"},
        make_tokenizer=_byte_level,
        special_tokens=one.special,
        template=one.chat_template,
        eos=one.special[:1],
        bos=one.bos,
        plain_tokens=one.plain,
    )


KINDS = {name: _published(one) for name, one in PUBLISHED.items()} | FAMILIES | VARIANTS
"""Also the published templates of `tests.support.templates`, on Llama's architecture."""
