"""Tiny encoders made on the spot, and an encoder in NumPy to compare any of them with.

The reference follows the formulae of Devlin et al. (2018) in float64, one text at a time and
without padding; it reads weights by itself and shares no code with the server.
"""

import json
import math
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.support.tiny import CORPUS

Doubles = NDArray[np.float64]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FLOATS = {"F32": np.float32, "F16": np.float16}


def build_tiny_bert(
    folder: Path,
    *,
    model_type: str = "bert",
    pooling: Sequence[str] | None = ("mean_tokens",),
    normalize: bool = True,
    context: int = 128,
    longest: int | None = None,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
    scores: bool = False,
) -> Path:
    """Write a random encoder to `folder` and return it; with `scores` one that judges pairs.

    `pooling` names the ways that are switched on; None leaves sentence-transformers' files out.
    `longest` is the limit that these set to a text.
    """
    folder.mkdir(parents=True)
    tokenizer = wordpiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    config = {
        "model_type": model_type,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": context + (model_type != "bert"),
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    if scores:
        config |= {"architectures": ["TinyForSequenceClassification"], "id2label": {"0": "L"}}
        pooling = None
    _write(folder / "config.json", config)
    mx.save_safetensors(
        str(folder / "model.safetensors"), _weights(config, seed), metadata={"format": "pt"}
    )
    if pooling is not None:
        write_modules(folder, pooling, normalize)
    if longest is not None:
        _write(folder / "sentence_bert_config.json", {"max_seq_length": longest})
    return folder


def wordpiece() -> Tokenizer:
    """A tokenizer of BERT's kind for the words of the tests' corpus, and letters for others."""
    words = sorted({word.strip(".,;:!?").lower() for text in CORPUS for word in text.split()})
    letters = [chr(code) for code in range(0x21, 0x7F)]
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {piece: index for index, piece in enumerate(pieces) if piece}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def write_modules(folder: Path, pooling: Sequence[str], normalize: bool) -> None:
    """Write sentence-transformers' files to a model's folder."""
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts if normalize else parts[:2])
    ]
    _write(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", *pooling)
    switches = {f"pooling_mode_{name}": name in pooling for name in known}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32} | switches)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _weights(config: dict[str, Any], seed: int) -> dict[str, mx.array]:
    random = np.random.default_rng(seed)
    return {
        name: mx.array(_random(name, shape, random).astype(np.float32))
        for name, shape in _shapes(config).items()
    }


def _random(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Doubles:
    if name.endswith("LayerNorm.weight"):
        return 1 + 0.2 * random.standard_normal(shape)
    scale = 0.2 if len(shape) == 1 else 2 * shape[-1] ** -0.5
    return scale * random.standard_normal(shape)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters of a published checkpoint, its unused head included."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        linear = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (width, width)}
        linear |= {"intermediate.dense": (wide, width), "output.dense": (width, wide)}
        for name, shape in linear.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
    return shapes | (_head_shapes(config) if "architectures" in config else {})


def _head_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a published cross-encoder has on top; BERT's pooler is the first layer of its head."""
    width = config["hidden_size"]
    if config["model_type"] == "bert":
        return {"classifier.weight": (1, width), "classifier.bias": (1,)}
    dense = {"classifier.dense.weight": (width, width), "classifier.dense.bias": (width,)}
    return dense | {"classifier.out_proj.weight": (1, width), "classifier.out_proj.bias": (1,)}


class ReferenceEncoder:
    """The encoder in `folder`, computed in float64."""

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._weights = read_safetensors(folder / "model.safetensors")

    @cached_property
    def width(self) -> int:
        """Numbers in a token's vector."""
        return int(self._config["hidden_size"])

    def states(self, tokens: Sequence[int], kinds: int | Sequence[int] = 0) -> Doubles:
        """The last layer's output (tokens, width)."""
        first = 0 if self._config["model_type"] == "bert" else self._config["pad_token_id"] + 1
        positions = np.arange(first, first + len(tokens))
        x = self._table("word")[list(tokens)] + self._table("position")[positions]
        types = kinds if isinstance(kinds, int) else list(kinds)
        x = self._norm(x + self._table("token_type")[types], "embeddings.LayerNorm")
        for layer in range(self._config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}"
            mixed = self._linear(self._attention(x, at), f"{at}.attention.output.dense")
            x = self._norm(x + mixed, f"{at}.attention.output.LayerNorm")
            wide = gelu(self._linear(x, f"{at}.intermediate.dense"))
            x = self._norm(x + self._linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return x

    def mean(self, tokens: Sequence[int]) -> Doubles:
        """The mean of the tokens' vectors, scaled to length 1."""
        return unit(self.states(tokens).mean(axis=0))

    def score(self, tokens: Sequence[int], kinds: Sequence[int]) -> float:
        """How well a pair fits, from 0 to 1."""
        bert = self._config["model_type"] == "bert"
        dense, out = ("pooler.dense", "classifier")
        if not bert:
            dense, out = "classifier.dense", "classifier.out_proj"
        first = self.states(tokens, kinds)[:1]
        [[logit]] = self._linear(np.tanh(self._linear(first, dense)), out)
        return float(1 / (1 + np.exp(-logit)))

    def _attention(self, x: Doubles, at: str) -> Doubles:
        heads = self._config["num_attention_heads"]
        q, k, v = (
            self._linear(x, f"{at}.attention.self.{name}").reshape(len(x), heads, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Doubles = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
        return mixed

    def _linear(self, x: Doubles, name: str) -> Doubles:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, x: Doubles, name: str) -> Doubles:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + self._config["layer_norm_eps"])
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _table(self, name: str) -> Doubles:
        return self._weights[f"embeddings.{name}_embeddings.weight"]


def gelu(x: Doubles) -> Doubles:
    """`x` times the normal distribution's share below `x` (Hendrycks and Gimpel, 2016)."""
    shares: Doubles = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.flat])
    return x * shares.reshape(x.shape)


def unit(vector: Doubles) -> Doubles:
    """`vector` scaled to length 1."""
    return vector / math.sqrt(float(vector @ vector))


def read_safetensors(file: Path) -> dict[str, Doubles]:
    """The floating-point tensors of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors: dict[str, Doubles] = {}
    for name, entry in header.items():
        if entry["dtype"] in FLOATS:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(data[begin:end], FLOATS[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"]).astype(np.float64)
    return tensors
