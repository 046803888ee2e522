"""Every kind of GGUF file that people have: quantizations, architectures, tokenizers."""

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from mlx_server.models.store.gguf.affine import ANEW, EXACT, quantized
from mlx_server.models.store.gguf.architectures import ARCHITECTURES, TOP_LEVEL
from mlx_server.models.store.gguf.convert import convert

ROWS, COLUMNS = 6, 512
LAYERS = 7
"""Enough for one of Gemma 3's layers without a window."""
SIZES = {"embedding_length": 64, "block_count": LAYERS, "feed_forward_length": 96}
HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2}
PROMPT = [5, 80, 12, 3, 200, 7, 9, 41]


# quantizations


def random_blocks(kind: Kind, seed: int = 0) -> np.ndarray:
    """(ROWS, bytes) of a quantized tensor: any quants, and halves that are finite numbers."""
    generator = np.random.default_rng(seed)
    weights, nbytes = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // weights, nbytes), dtype=np.uint8)
    halves = generator.uniform(0.01, 0.1, (len(blocks), 2)).astype("<f2").view(np.uint8)
    if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q4_1, Kind.Q5_1):
        blocks[:, :4] = halves
    elif kind is Kind.Q2_K:
        blocks[:, -4:] = halves
    elif kind in (Kind.Q6_K, Kind.Q3_K, Kind.TQ1_0, Kind.TQ2_0, Kind.IQ1_M):
        blocks[:, -2:] = halves[:, :2]
        if kind is Kind.IQ1_M:  # its half is spread over the scales' upper nibbles
            blocks[:, -8:] &= 0x0F
            blocks[:, -1] |= 0x20
    elif kind is Kind.MXFP4:
        blocks[:, 0] = 120
    else:
        blocks[:, :2] = halves[:, :2]
    return blocks.reshape(ROWS, -1)


def tensor_of(kind: Kind, tmp_path: Path) -> Any:
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("one", random_blocks(kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [tensor] = GGUFReader(tmp_path / "one.gguf").tensors
    return tensor


def as_mlx_has_it(layer: Any) -> np.ndarray:
    return np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, layer.bits))


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_quants_in_groups_of_32_stay_what_they_are(kind: Kind, tmp_path: Path) -> None:
    tensor = tensor_of(kind, tmp_path)
    layer = quantized(tensor, None, mx.float32)
    assert layer is not None
    assert layer.bits == EXACT[kind].bits
    expected = dequantize(tensor.data, kind)
    np.testing.assert_allclose(as_mlx_has_it(layer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [kind for kind in ANEW if kind not in (Kind.Q8_1, Kind.Q8_K)], ids=lambda k: k.name
)
def test_other_quants_are_read_and_lose_little(kind: Kind, tmp_path: Path) -> None:
    tensor = tensor_of(kind, tmp_path)
    layer = quantized(tensor, None, mx.float32)
    assert layer is not None
    expected = dequantize(tensor.data, kind)
    assert np.isfinite(expected).all()
    error = np.abs(as_mlx_has_it(layer) - expected).mean() / np.abs(expected).mean()
    assert error < {4: 0.1, 5: 0.06, 6: 0.02, 8: 0.005}[layer.bits]


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_width_that_is_asked_for_is_kept_to(bits: int, tmp_path: Path) -> None:
    for kind in (Kind.Q4_K, Kind.Q6_K):
        layer = quantized(tensor_of(kind, tmp_path), bits, mx.bfloat16)
        assert layer is not None
        assert layer.bits == bits


# architectures

EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"attention.key_length": 32},
    "gemma2": {"attention.key_length": 32, "attn_logit_softcapping": 40.0},
    "gemma3": {"attention.key_length": 32, "attention.sliding_window": 4},
    "phi3": {"rope.dimension_count": 8, "rope.scaling.original_context_length": 64},
}
LENGTHS = ("long", "short")
TENSORS: dict[str, dict[str, np.ndarray]] = {
    "phi3": {
        f"rope_factors_{name}.weight": np.linspace(1, 3, 4, dtype="f4")
        for name in ("long", "short")
    }
}
SCALED: dict[str, dict[str, Any]] = {
    "qwen2": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    "gemma3": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
}
SCALED["qwen2"]["rope.scaling.original_context_length"] = 32


def random_tensors(name: str) -> dict[str, np.ndarray]:
    """A random model as the file has it."""
    generator = np.random.default_rng(4)
    head = EXTRA[name].get("attention.key_length", 16)
    width, inner, queries, keys = 64, 96, 4 * head, 2 * head
    shapes = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_qkv": (queries + 2 * keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (inner, width),
        "ffn_up": (2 * inner if name == "phi3" else inner, width),
        "ffn_down": (width, inner),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
    }
    tensors = {"token_embd.weight": generator.normal(0, 0.1, (256, width))}
    tensors["output_norm.weight"] = generator.uniform(0.5, 1.5, width)
    architecture = ARCHITECTURES[name]
    for number in range(LAYERS):
        for part in architecture.parts:
            shape = shapes.get(part, (width,))
            values = generator.normal(0, 0.2, shape)
            tensors[f"blk.{number}.{part}.weight"] = (
                generator.uniform(0.5, 1.5, shape) if part.endswith("norm") else values
            )
            if part in architecture.biased:
                tensors[f"blk.{number}.{part}.bias"] = generator.normal(0, 0.2, shape[:1])
    return {name: values.astype("f4") for name, values in tensors.items()}


def write_model(path: Path, name: str, tensors: dict[str, np.ndarray], **options: Any) -> Path:
    writer = GGUFWriter(path, name)
    common = SIZES | HEADS | {"context_length": 128, "attention.layer_norm_rms_epsilon": 1e-6}
    for key, value in (common | EXTRA[name] | options).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{name}.{key}", value)
    tokens = [f"t{i}" for i in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    for key, values in (tensors | TENSORS.get(name, {})).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(tmp_path: Path, name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    source = write_model(tmp_path / "one.gguf", name, random_tensors(name), **options)
    folder = tmp_path / "out"
    folder.mkdir()
    convert(source, folder)
    model, config = load_model(folder)
    model.set_dtype(mx.float32)
    return model, config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_tensor_of_an_architecture_finds_its_place(name: str, tmp_path: Path) -> None:
    model, _ = converted(tmp_path, name)
    loaded = dict(tree_flatten(model.parameters()))
    architecture = ARCHITECTURES[name]
    for tensor, values in random_tensors(name).items():
        module = architecture.module(tensor)
        norm = module.endswith("norm")
        expected = values - architecture.norm_shift if norm else values
        mine = np.array(loaded.pop(f"{module}.{tensor.rpartition('.')[2]}"))
        np.testing.assert_allclose(mine, expected, atol=0.01, err_msg=tensor)
    assert not loaded
    assert set(TOP_LEVEL.values()) >= {"model.norm", "model.embed_tokens"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_model_computes(name: str, tmp_path: Path) -> None:
    model, config = converted(tmp_path, name, **SCALED.get(name, {}))
    logits = model(mx.array([PROMPT]))
    assert mx.isfinite(logits).all().item()
    assert config["max_position_embeddings"] == 128
    if "rope.scaling.type" in SCALED.get(name, {}):
        assert config["rope_scaling"]["factor"] == SCALED[name]["rope.scaling.factor"]


def test_gemma_s_scalars_come_from_the_file(tmp_path: Path) -> None:
    _, config = converted(tmp_path, "gemma2")
    assert config["attn_logit_softcapping"] == 40.0
    assert config["query_pre_attn_scalar"] == 32.0


# SentencePiece


def trained(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer as Llama's, or without a space in front, as Gemma's, of a few words."""
    words = ["the quick brown fox", "jumps over the lazy dog", "a  b", "naïve café", "12 345"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=[] if prefix else ["\n\n"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=[True, False], ids=["Llama", "Gemma"])
def pieces(request: pytest.FixtureRequest) -> sentencepiece.SentencePieceProcessor:
    return trained(request.param)


@pytest.mark.parametrize(
    "text",
    [
        "the quick brown fox",
        "over a lazy, lazy dog!",
        " leading and  double spaces",
        "naïve 日本 😀 café",
        "12 345 6789",
        "one\n\ntwo\nthree",
        "thethethe quickquick",
    ],
)
def test_sentence_piece_s_own_tokens_come_out(
    pieces: sentencepiece.SentencePieceProcessor, text: str, tmp_path: Path
) -> None:
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    common = SIZES | HEADS | {"context_length": 128}
    for key, value in common.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    count = pieces.get_piece_size()
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([pieces.get_score(i) for i in range(count)])
    writer.add_token_types([kind_of(pieces, i) for i in range(count)])
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(pieces.encode_as_pieces("x")[0].startswith("\u2581"))
    for name, values in (random_tensors("llama")).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = tmp_path / "out"
    folder.mkdir()
    convert(tmp_path / "one.gguf", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == [1, *pieces.encode(text)]
    assert tokenizer.decode(ids) == text
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"]


def kind_of(pieces: sentencepiece.SentencePieceProcessor, i: int) -> int:
    if pieces.is_unknown(i):
        return 2
    if pieces.is_control(i):
        return 3
    if pieces.is_byte(i):
        return 6
    return 4 if pieces.id_to_piece(i) == "\n\n" else 1
