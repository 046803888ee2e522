"""A converted GGUF file computes what the original does; what cannot be converted is refused."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load
from tokenizers import Tokenizer

from mlx_server.errors import BadRequest, ServerError
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.gguf.convert import convert
from mlx_server.models.store.gguf_import import import_into
from tests.support.store import sources_in

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 96, 2
F32, Q4_1, Q8_0 = 0, 3, 8

LETTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
LETTERS += [chr(256 + index) for index in range(68)]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ a"]
SPECIALS = ["<|end|>", "<|turn|>"]
TOKENS = SPECIALS + LETTERS + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for m in messages %}{{ '<|turn|>' + m['content'] }}{% endfor %}"

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}


# a writer for the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


def write_gguf(file: Path, metadata: dict[str, Any], tensors: dict[str, tuple[int, Any]]) -> Path:
    """`tensors` gives each name a type and its float32 values."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, (kind, values) in tensors.items():
        shape = values.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += {F32: _plain, Q4_1: _q4_1, Q8_0: _q8_0}[kind](values)
        data += bytes(-len(data) % 32)
    file.write_bytes(head + bytes(-len(head) % 32) + data)
    return file


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def _plain(values: np.ndarray) -> bytes:
    return values.astype("<f4").tobytes()


def _q8_0(values: np.ndarray) -> bytes:
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1) / 127).astype("<f2")
    numbers = np.round(blocks / scales[:, None].astype("f4")).astype("i1")
    pairs = zip(scales, numbers, strict=True)
    return b"".join(scale.tobytes() + block.tobytes() for scale, block in pairs)


def _q4_1(values: np.ndarray) -> bytes:
    blocks = values.reshape(-1, 32)
    low = blocks.min(axis=1)
    scales = ((blocks.max(axis=1) - low) / 15).astype("<f2")
    low = low.astype("<f2")
    steps = (blocks - low[:, None].astype("f4")) / scales[:, None].astype("f4")
    numbers = np.clip(np.round(steps), 0, 15).astype("u1")
    packed = numbers[:, :16] | (numbers[:, 16:] << 4)
    rows = zip(scales, low, packed, strict=True)
    return b"".join(s.tobytes() + m.tobytes() + p.tobytes() for s, m, p in rows)


# the same model in both layouts


def original_model() -> Model:
    """A random Llama in the hub's layout."""
    mx.random.seed(3)
    return Model(
        ModelArgs(
            model_type="llama",
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            intermediate_size=FEED_FORWARD,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            rms_norm_eps=1e-5,
            vocab_size=len(TOKENS),
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    )


def gguf_tensors(model: Model, kind: int = F32) -> dict[str, tuple[int, Any]]:
    """The model's weights as llama.cpp's converter names and orders them."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        values = np.array(array)
        for module, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if module in name:
                halves = values.reshape(heads, 2, -1, HIDDEN)
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = (kind if values.ndim == 2 else F32, values)
    return tensors


def converted(tmp_path: Path, kind: int = F32, **changes: Any) -> Path:
    source = write_gguf(
        tmp_path / "tiny.gguf", METADATA | changes, gguf_tensors(original_model(), kind)
    )
    return into(tmp_path / "models", source)


def into(models: Path, source: Path) -> Path:
    """Convert in this process, as the converting process does."""
    folder = models / source.stem
    folder.mkdir(parents=True)
    convert(source, folder)
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), [(F32, 1e-4), (Q8_0, 0.03), (Q4_1, 0.3)])
def test_a_converted_model_computes_what_the_original_does(
    tmp_path: Path, kind: int, tolerance: float
) -> None:
    model = load(str(converted(tmp_path, kind)))[0]
    prompt = mx.array([[5, 80, 12, 3, 200, 7, 9, 41]])
    wanted = original_model()(prompt)
    error = mx.abs(model(prompt) - wanted).max() / mx.abs(wanted).max()
    assert error.item() < tolerance


@pytest.mark.parametrize(("kind", "bits"), [(Q8_0, 8), (Q4_1, 4)])
def test_quantized_weights_stay_quantized(tmp_path: Path, kind: int, bits: int) -> None:
    config = json.loads((converted(tmp_path, kind) / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits}


def test_layers_of_another_width_are_listed(tmp_path: Path) -> None:
    tensors = gguf_tensors(original_model(), Q4_1)
    tensors["token_embd.weight"] = (Q8_0, tensors["token_embd.weight"][1])
    source = write_gguf(tmp_path / "mixed.gguf", METADATA, tensors)
    folder = into(tmp_path / "models", source)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["model.embed_tokens"] == {"group_size": 32, "bits": 8}
    load(str(folder))


def test_the_tokenizer_knows_special_tokens_and_the_chat_template(tmp_path: Path) -> None:
    tokenizer = load(str(converted(tmp_path)))[1]
    messages = [{"role": "user", "content": "the"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=True)
    assert prompt[0] == TOKENS.index("<|turn|>")
    assert tokenizer.eos_token_ids == {0}
    assert tokenizer.decode(tokenizer.encode("the äöü 日本 12")) == "the äöü 日本 12"


@pytest.mark.parametrize(
    ("rule", "text", "pieces"),
    [
        ("smollm", "a 12 the", ["a", "Ġ", "1", "2", "Ġthe"]),
        ("gpt-2", "a 12 the", ["a", "Ġ12", "Ġthe"]),
        ("llama-bpe", "a 1234 THE", ["a", "Ġ", "123", "4", "ĠTHE"]),
        ("llama-bpe", "it'S\n\nx", ["it", "'S", "ĊĊ", "x"]),
        ("qwen2", "a 12\n the", ["a", "Ġ", "1", "2", "Ċ", "Ġthe"]),
        ("default", "a-b 1234", ["a", "-", "b", "Ġ", "123", "4"]),
    ],
)
def test_texts_are_cut_as_the_named_pre_tokenizer_does(
    tmp_path: Path, rule: str, text: str, pieces: list[str]
) -> None:
    folder = converted(tmp_path, **{"tokenizer.ggml.pre": rule})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.add_bos_token": True}, True),
    ],
)
def test_the_beginning_of_text_token_is_added_when_the_file_says_so(
    tmp_path: Path, changes: dict[str, Any], expected: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(converted(tmp_path, **changes) / "tokenizer.json"))
    assert (tokenizer.encode("a").ids[0] == 1) is expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "mamba"}, "architecture"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer"),
        ({"tokenizer.ggml.pre": "klingon"}, "klingon"),
        ({"llama.expert_count": 8}, "experts"),
        ({"split.count": 3}, "gguf-split"),
        ({"llama.rope.scaling.type": "ntk"}, "ntk"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason):
        converted(tmp_path, **changes)


def test_a_refused_import_names_the_file_and_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = gguf_tensors(original_model())
    tensors["blk.0.attn_q.bias"] = (F32, np.zeros(HIDDEN, dtype="f4"))
    source = write_gguf(tmp_path / "odd.gguf", METADATA, tensors)
    with pytest.raises(BadRequest, match=r"odd\.gguf.*blk\.0\.attn_q\.bias"):
        import_into(source, tmp_path / "models")
    assert [file.name for file in (tmp_path / "models").iterdir() if file.is_dir()] == []


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_position_scaling_of_llama_3_is_recovered(tmp_path: Path, factor: float) -> None:
    count = HIDDEN // HEADS // 2
    divisors = [_published_divisor(factor, 500000.0 ** (i / count)) for i in range(count)]
    tensors = gguf_tensors(original_model())
    tensors["rope_freqs.weight"] = (F32, np.array(divisors, dtype="f4"))
    metadata = METADATA | {"llama.rope.freq_base": 500000.0}
    folder = into(tmp_path / "models", write_gguf(tmp_path / "l3.gguf", metadata, tensors))
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == factor
    load(str(folder))


def _published_divisor(factor: float, period: float) -> float:
    """https://github.com/meta-llama/llama-models: apply_scaling, as the divisor of a frequency."""
    wavelength = 2 * np.pi * period
    if wavelength < 8192 / 4:
        return 1.0
    if wavelength > 8192 / 1:
        return factor
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return float(1 / ((1 - smooth) / factor + smooth))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(200), b"PK\3\4" + bytes(100)])
def test_a_broken_file_is_an_error_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ServerError, match=r"broken\.gguf"):
        import_into(source, tmp_path / "models")
    assert [file.name for file in (tmp_path / "models").iterdir() if file.is_dir()] == []


def test_a_gguf_path_is_served_after_the_catalog_added_it(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", METADATA, gguf_tensors(original_model()))
    catalog = Catalog(sources_in(tmp_path / "home"))
    entry = catalog.add(str(source))
    assert entry.id == "tiny"
    assert catalog.find(str(source)).path == entry.path
    before = (entry.path / "config.json").stat().st_mtime_ns if entry.path else 0
    again = Catalog(sources_in(tmp_path / "home")).add(str(source))
    assert again.path is not None
    assert (again.path / "config.json").stat().st_mtime_ns == before


def test_a_changed_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    tensors = gguf_tensors(original_model())
    source = write_gguf(tmp_path / "tiny.gguf", METADATA, tensors)
    import_into(source, tmp_path / "models")
    write_gguf(source, METADATA | {"llama.context_length": 256}, tensors)
    folder = import_into(source, tmp_path / "models")
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 256


def test_what_an_interrupted_import_left_is_cleared(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", METADATA, gguf_tensors(original_model()))
    left = [tmp_path / "models" / f"tiny.{step}.partial" for step in ("new", "old")]
    for folder in left:
        folder.mkdir(parents=True)
    folder = import_into(source, tmp_path / "models")
    left[1].mkdir()
    assert import_into(source, tmp_path / "models") == folder
    assert not any(folder.exists() for folder in left)


def test_an_imported_model_is_served_from_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", METADATA, gguf_tensors(original_model()))
    folder = import_into(source, tmp_path / "models")
    lock = tmp_path / "models" / ".tiny.lock"
    lock.unlink()
    lock.mkdir()  # so that it cannot be opened, not even by root
    assert import_into(source, tmp_path / "models") == folder
    os.utime(source, (0, 0))
    with pytest.raises(OSError, match="directory"):
        import_into(source, tmp_path / "models")


def test_another_model_of_that_name_is_never_overwritten(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", METADATA, gguf_tensors(original_model()))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    with pytest.raises(BadRequest, match="rename"):
        import_into(source, tmp_path / "models")


def test_the_front_never_loads_mlx_for_a_conversion() -> None:
    script = (
        "import sys, mlx_server.models.store.gguf_import, mlx_server.models.store.fetch;"
        "sys.exit('mlx.core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
