"""One GGUF file becomes an MLX folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType as Kind

from mlx_server.errors import BadRequest
from mlx_server.models.store.gguf.affine import GROUP, quantized, values
from mlx_server.models.store.gguf.architectures import (
    ROPE_TENSORS,
    Architecture,
    architecture_of,
    common_config,
)
from mlx_server.models.store.gguf.reading import GgufFile
from mlx_server.models.store.gguf.tokenizers import build_tokenizer, token_ids, tokenizer_config

if TYPE_CHECKING:
    import mlx.core as mx
    from gguf import ReaderTensor

    Arrays = dict[str, mx.array]

SHARD_BYTES = 4 << 30
EMBEDDING = "token_embd.weight"


def convert(source: Path, folder: Path, bits: int | None = None) -> None:
    """Quantized to `bits`, or as the file is. Raises BadRequest for an unsupported file."""
    file = GgufFile(source)
    architecture = architecture_of(file)
    tokenizer = build_tokenizer(file)
    dtype = _dtype(file, architecture)
    writer = _Writer(folder)
    widths: dict[str, int] = {}
    for name, tensor in file.tensors.items():
        if name not in ROPE_TENSORS:
            width = _convert(tensor, architecture, bits, dtype, writer)
            if width is not None:
                widths[architecture.module(name)] = width
    writer.close()
    vocab_size = int(file.tensors[EMBEDDING].shape[1])
    config = {
        "model_type": architecture.model_type,
        **common_config(file, vocab_size, tied="lm_head.weight" not in writer.places),
        **architecture.config(file),
        **token_ids(file),
        **_quantization(widths),
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file))
    _write_json(folder / "generation_config.json", token_ids(file))
    _write_json(folder / "config.json", config)


def _dtype(file: GgufFile, architecture: Architecture) -> "mx.Dtype":
    """Of all that is not quantized: GGUF's float32 norms would make all activations float32."""
    import mlx.core as mx

    if EMBEDDING not in file.tensors:
        raise BadRequest("it has no token embedding")
    plain = {Kind.F32: mx.float32, Kind.F16: mx.float16, Kind.BF16: mx.bfloat16}
    usual: mx.Dtype = getattr(mx, architecture.half)
    found = plain.get(file.tensors[EMBEDDING].tensor_type, usual)
    return usual if found == mx.float16 else found


def _convert(
    tensor: "ReaderTensor",
    architecture: Architecture,
    bits: int | None,
    dtype: "mx.Dtype",
    writer: "_Writer",
) -> int | None:
    """Returns the bits that the tensor is quantized to."""
    import mlx.core as mx

    module = architecture.module(tensor.name)
    kind = tensor.name.rpartition(".")[2]
    if kind == "weight" and (layer := quantized(tensor, bits, dtype)) is not None:
        writer.add(f"{module}.weight", layer.weight)
        writer.add(f"{module}.scales", layer.scales)
        writer.add(f"{module}.biases", layer.biases)
        return layer.bits
    array = mx.array(values(tensor))
    if module.endswith("norm"):
        array = array - architecture.norm_shift
    writer.add(f"{module}.{kind}", array.astype(dtype))
    return None


class _Writer:
    """Safetensors in shards; `places` has each array's file."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, str] = {}
        self._folder = folder
        self._arrays: Arrays = {}
        self._bytes = 0
        self._whole = 0
        self._files: list[list[str]] = []

    def add(self, name: str, array: "mx.array") -> None:
        if self._bytes and self._bytes + array.nbytes > SHARD_BYTES:
            self._flush()
        self._arrays[name] = array
        self.places[name] = ""
        self._bytes += array.nbytes
        self._whole += array.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        for number, names in enumerate(self._files, 1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            file = file if count > 1 else "model.safetensors"
            (self._folder / _part(number)).rename(self._folder / file)
            self.places |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._whole}, "weight_map": self.places}
            _write_json(self._folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        import mlx.core as mx

        self._files.append(list(self._arrays))
        part = self._folder / _part(len(self._files))
        mx.save_safetensors(str(part), self._arrays, {"format": "mlx"})
        self._arrays, self._bytes = {}, 0


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _quantization(widths: dict[str, int]) -> dict[str, Any]:
    if not widths:
        return {}
    bits = list(widths.values())
    usual = max(set(bits), key=bits.count)
    others = {
        module: {"group_size": GROUP, "bits": width}
        for module, width in sorted(widths.items())
        if width != usual
    }
    return {"quantization": {"group_size": GROUP, "bits": usual} | others}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
