"""Estimates models' memory from their files' headers."""

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_server.dimensions import (
    HEAD,
    HEAD_REPEATS,
    HEADS,
    INNER_WIDTH,
    KV_HEADS,
    LAYERS,
    LOOPS,
    VOCABULARY,
    WIDTH,
    Config,
    Way,
    context_length,
    families,
    head_weights,
    layers_of_ranks,
    number,
    text_part,
)
from mlx_server.errors import ModelLoadFailed, reason
from mlx_server.models.store.folder import WEIGHTS, read_config
from mlx_server.models.store.lora import WEIGHTS as ADAPTER_WEIGHTS

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
FLOAT32_BYTES = 4
KV_BYTES = 2
"""Half precision."""
KV_GROUP_SIZES = (64, 32)
"""Numbers per scale and bias in quantized KV caches: the first that divides a head."""
PACKED_BITS = (2, 3, 4, 5, 6, 8)
SAMPLING_COPIES = 4
SCORE_COPIES = 2
UNFUSED_KEYS = 512
"""Tokens up to which attention may materialize its scores."""
FULL_ATTENTION = ("full_attention", "attention")
"""Layer types with a growing KV cache."""
WIDE_HEAD = ("global_head_dim", "swa_head_dim")
"""Of some layers."""
LATENTS = frozenset(
    {
        *("bailing_hybrid", "bailing_moe_v3", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
        *("glm_moe_dsa", "joyai_llm_flash", "kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear"),
        *("kimi_vl", "longcat_flash", "longcat_flash_ngram", "mistral4"),
    }
)
"""Families with multi-head latent attention whose caches hold what keys and values are made of."""
EXPANDED_LATENTS = frozenset({"deepseek_v2", "minicpm3", "youtu_llm"})
"""Those whose caches hold keys and values."""
TWO_CACHES = frozenset({"longcat_flash", "longcat_flash_ngram"})
"""In each layer."""
UNDIVIDED = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|output)\.")
"""Embeddings and the output projection."""
LAYER = re.compile(r"(^|\.)layers\.(?P<number>\d+)\.")
LARGEST_HEADER = 100_000_000
HEADER = struct.Struct("<Q")
KV_STEP = 256
"""Tokens by which caches grow."""
LARGEST_CHUNK = 2048
"""Tokens with activations in memory at once."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes: weights once loaded (dequantized if `float32`), and costs per token."""

    float32: bool
    weights: int
    kv_per_token: int
    context_length: int
    vocabulary: int
    activations_per_token: int
    largest_chunk: int = LARGEST_CHUNK
    undivided: int = 0
    """Bytes of `weights` that each rank has of a model whose layers are divided."""
    latent: bool = False
    """Whether each rank has all of its KV caches then."""
    layers: tuple[int, ...] = ()
    """Bytes of `weights` in each layer."""

    def beside(self, draft: "Footprint") -> "Footprint":
        """With a draft model in the same engine, which computes in turns with it."""
        return replace(
            self,
            weights=self.weights + draft.weights,
            kv_per_token=self.kv_per_token + draft.kv_per_token,
            vocabulary=max(self.vocabulary, draft.vocabulary),
            activations_per_token=max(self.activations_per_token, draft.activations_per_token),
        )

    def kv(self, tokens: int) -> int:
        return (tokens + KV_STEP) * self.kv_per_token

    def of_rank(self, ranks: int, way: Way = "tensor") -> "Footprint":
        """Of each of the processes among which the model is divided, or of the one with most."""
        if ranks == 1:
            return self
        if way == "pipeline":
            return self._of_layers(ranks)
        divided = self.weights - self.undivided
        return replace(
            self,
            weights=self.undivided + -(-divided // ranks),
            kv_per_token=self.kv_per_token if self.latent else -(-self.kv_per_token // ranks),
        )

    def _of_layers(self, ranks: int) -> "Footprint":
        """All layers are taken to have equal caches."""
        shares = layers_of_ranks(len(self.layers), ranks)
        heaviest = max(sum(self.layers[number] for number in share) for share in shares)
        most = max(map(len, shares))
        return replace(
            self,
            weights=self.weights - sum(self.layers) + heaviest,
            kv_per_token=-(-self.kv_per_token * most // len(self.layers)),
            layers=(),
        )

    def working(self, max_batch: int) -> int:
        """A chunk's activations, and a batch's logits while sampling."""
        logits = max_batch * self.vocabulary * FLOAT32_BYTES
        return self.largest_chunk * self.activations_per_token + SAMPLING_COPIES * logits


def read_footprint(
    path: Path,
    float32: bool,
    adapter: Path | None = None,
    kv_bits: int | None = None,
    packed: bool = False,
    *,
    head: bool = False,
) -> Footprint:
    """`float32` dequantizes weights, `packed` computes in float32 with quantized ones; with both,
    there are both. `kv_bits` quantizes KV caches, `head` loads the model's own head, if there is
    one. Raises ModelLoadFailed for damaged files.
    """
    config = read_config(path)
    all_tensors = [tensor for file in sorted(path.glob(WEIGHTS)) for tensor in _tensors(file)]
    if not all_tensors:
        raise ModelLoadFailed(f"{path.name} has no {WEIGHTS} file.")
    names = head_weights(config)
    body = [tensor for tensor in all_tensors if names is None or not names.match(tensor.name)]
    own = _of_head(all_tensors, names) if head and names is not None else []
    tensors = [*body, *own]
    added = _tensors(adapter / ADAPTER_WEIGHTS) if adapter else []
    stored = sum(tensor.bytes for tensor in (*tensors, *added))
    parameters = _parameters(tensors, config) + _elements(added)
    weights = parameters * FLOAT32_BYTES if float32 else stored
    if packed:
        rest = 0 if float32 else FLOAT32_BYTES
        weights = _packed_bytes(tensors, rest) + (weights if float32 else rest * _elements(added))
    ends = [tensor for tensor in tensors if UNDIVIDED.search(tensor.name)]
    undivided = (
        _parameters(ends, config) * FLOAT32_BYTES if float32 else sum(one.bytes for one in ends)
    )
    wide = sum(tensor.bytes for tensor in tensors if tensor.dtype == "F32") > stored / 2
    size = FLOAT32_BYTES if float32 or packed or wide else KV_BYTES
    width = number(config, WIDTH)
    return Footprint(
        float32=float32,
        weights=weights,
        kv_per_token=_kv_bytes_per_token(config, size, kv_bits)
        + (_kv_bytes_per_layer(config, size) if own else 0),
        context_length=context_length(config),
        vocabulary=number(config, VOCABULARY),
        activations_per_token=size * (8 * width + 4 * number(config, INNER_WIDTH, 4 * width)),
        undivided=undivided,
        layers=_layers(body, config, float32),
        latent=bool(LATENTS.intersection(families(config))),
    )


def parameter_count(path: Path) -> int:
    """Once dequantized. Raises ModelLoadFailed for damaged files."""
    tensors = [tensor for file in sorted(path.glob(WEIGHTS)) for tensor in _tensors(file)]
    return _parameters(tensors, read_config(path))


def read_embedding_footprint(path: Path, float32: bool, longest: int | None) -> Footprint:
    """For a model without KV caches and logits; `longest` tokens at once. Raises ModelLoadFailed
    for damaged files.
    """
    plain = read_footprint(path, float32)
    context = min(plain.context_length, longest or plain.context_length)
    heads = number(read_config(path), HEADS, 1)
    scores = SCORE_COPIES * FLOAT32_BYTES * heads * min(context, UNFUSED_KEYS)
    return replace(
        plain,
        kv_per_token=0,
        context_length=context,
        vocabulary=0,
        activations_per_token=plain.activations_per_token + scores,
        largest_chunk=max(LARGEST_CHUNK, context),
    )


def _of_head(tensors: list["_Tensor"], names: re.Pattern[str]) -> list["_Tensor"]:
    """Those that a head has for itself, whose names begin with `names`."""
    found = [(tensor, names.match(tensor.name)) for tensor in tensors]
    return [one for one, at in found if at and not HEAD_REPEATS.match(one.name, at.end())]


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    elements: int
    bytes: int


def _tensors(file: Path) -> list[_Tensor]:
    try:
        with file.open("rb") as stream:
            (length,) = HEADER.unpack(stream.read(HEADER.size))
            if length > LARGEST_HEADER:
                raise ValueError("its header is implausibly large")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise TypeError("its header is no object")
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = [_tensor(name, entry) for name, entry in header.items()]
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise ModelLoadFailed(
            f"{file.name} is no readable safetensors file: {reason(error)}"
        ) from error
    expected = HEADER.size + length + end
    if size < expected:
        raise ModelLoadFailed(
            f"{file.name} is truncated: it has {size:,} of {expected:,} bytes. Pull it again."
        )
    return tensors


def _tensor(name: str, entry: dict[str, Any]) -> _Tensor:
    elements = math.prod(entry["shape"])
    begin, end = entry["data_offsets"]
    bits = BITS.get(entry["dtype"])
    if bits is not None and elements * bits != (end - begin) * 8:
        raise ValueError(f"the shape of {name} does not match its size")
    return _Tensor(name, entry["dtype"], elements, end - begin)


def _parameters(tensors: list[_Tensor], config: dict[str, Any]) -> int:
    """After dequantization: packed weights unpack, scales and biases go."""
    scales = _scales(tensors)
    settings = config.get("quantization")
    settings = settings if isinstance(settings, dict) else {}
    total = 0
    for tensor in tensors:
        base, _, part = tensor.name.rpartition(".")
        if base not in scales:
            total += tensor.elements
        elif part == "weight":
            own = settings.get(base)
            bits = (own if isinstance(own, dict) else settings).get("bits")
            total += tensor.bytes * 8 // (bits if bits in PACKED_BITS else 4)
    return total


def _packed_bytes(tensors: list[_Tensor], rest: int) -> int:
    """Of quantized weights to multiply by, with `rest` bytes for each number of all others."""
    scales = _scales(tensors)
    total = 0
    for tensor in tensors:
        base, _, part = tensor.name.rpartition(".")
        if base not in scales:
            total += tensor.elements * rest
        elif part == "weight":
            copies = 2 if rest and UNDIVIDED.search(tensor.name) else 1  # its rows are read, too
            total += copies * (tensor.bytes + 3 * scales[base].elements * FLOAT32_BYTES)
    return total


def _layers(tensors: list[_Tensor], config: dict[str, Any], float32: bool) -> tuple[int, ...]:
    """Bytes of the weights of each layer; further ones are none of the model's own."""
    found: dict[int, list[_Tensor]] = {}
    for tensor in tensors:
        if (layer := LAYER.search(tensor.name)) is not None:
            found.setdefault(int(layer["number"]), []).append(tensor)
    layers = [found.get(i, []) for i in range(number(config, LAYERS))]
    if float32:
        return tuple(_parameters(layer, config) * FLOAT32_BYTES for layer in layers)
    return tuple(sum(tensor.bytes for tensor in layer) for layer in layers)


def _elements(tensors: list[_Tensor]) -> int:
    return sum(tensor.elements for tensor in tensors)


def _scales(tensors: list[_Tensor]) -> dict[str, _Tensor]:
    """Of quantized weights, by the names of their modules."""
    ends = [tensor for tensor in tensors if tensor.name.endswith(".scales")]
    return {tensor.name.removesuffix(".scales"): tensor for tensor in ends}


def _kv_bytes_per_token(config: Config, size: int, kv_bits: int | None) -> int:
    """For all layers; some families' cheaper caches are overestimated. `size`: bytes of an
    unquantized number.
    """
    layers = number(config, LAYERS) * max(1, number(config, LOOPS, 1))
    layers *= 2 if TWO_CACHES.intersection(families(config)) else 1
    plain = _kv_bytes_per_layer(config, size)
    head_dim = _head_dim(config)
    group = next((group for group in KV_GROUP_SIZES if head_dim % group == 0), None)
    if kv_bits is None or group is None or _latent_numbers(config) is not None:
        return layers * plain
    groups = plain // (group * size)
    quantized = groups * (group * kv_bits // 8 + 2 * size)  # with a scale and a bias
    growing = _growing_layers(config, layers)
    return growing * quantized + (layers - growing) * plain


def _kv_bytes_per_layer(config: Config, size: int) -> int:
    """Of a layer that keeps keys and values, or what they are made of, unquantized."""
    if (latent := _latent_numbers(config)) is not None:
        return latent * size
    heads = max(1, number(config, HEADS, 1))
    return 2 * number(config, KV_HEADS, heads) * _head_dim(config) * size


def _head_dim(config: Config) -> int:
    heads = max(1, number(config, HEADS, 1))
    return max(number(config, HEAD, number(config, WIDTH) // heads), number(config, WIDE_HEAD))


def _latent_numbers(config: Config) -> int | None:
    """Numbers per token and layer of multi-head latent attention; None of any other."""
    kinds = families(config)
    positions = number(config, ("qk_rope_head_dim",))
    if LATENTS.intersection(kinds):
        index = number(config, ("index_head_dim",))
        return number(config, ("kv_lora_rank",)) + positions + 2 * index
    if EXPANDED_LATENTS.intersection(kinds):
        keys = number(config, ("qk_nope_head_dim",)) + positions
        return number(config, HEADS, 1) * (keys + number(config, ("v_head_dim",), keys))
    return None


def _growing_layers(config: Config, layers: int) -> int:
    kinds = text_part(config).get("layer_types")
    if isinstance(kinds, list):
        return min(layers, sum(kind in FULL_ATTENTION for kind in kinds))
    pattern = number(config, ("sliding_window_pattern",))
    return layers // pattern if pattern else layers
