"""What Metal and CUDA run, forced on a CPU: its tokens are those of the CPU's own path."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_server.engine.cpu import activations, attention
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling
from mlx_server.engine.run import cuda
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.engine.conftest import request
from tests.engine.test_mixed import tokens_of
from tests.support.architectures import build_architecture
from tests.support.tiny import KINDS as FAMILIES
from tests.support.tiny import build_recurrent_model, build_tiny_model

STREAMS = [
    request(range(3, 23), 30),
    request(range(7, 60), 24, Sampling(seed=1, temperature=0.9, presence_penalty=0.7)),
    request(range(30, 41), 36, Sampling(seed=2, top_p=0.9, repetition_penalty=1.2), logprobs=2),
]
LATE = [
    request([(7 * i) % 120 for i in range(130)], 12),
    request([(5 * i) % 120 for i in range(40)], 12, Sampling(seed=3, top_k=20, min_p=0.01)),
]
BOUND = request(range(40, 50), 16, Sampling(seed=4), grammar="start: /[a-z ]{3,12}/")

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="compares with the CPU's own path"
)


OFTEN = [
    ("metal", "llama", "float32", None),
    ("metal", "qwen", "4 bits", 4),
    ("metal", "recurrent", "float32", None),
    ("cuda", "llama", "4 bits", 8),
    ("cuda", "gemma", "bfloat16", None),
    ("cuda", "qwen3_moe", "4 bits", None),
]
SELDOM = [
    ("metal", "llama", "float32", 8),
    ("metal", "llama", "bfloat16", None),
    ("metal", "gemma", "float32", None),
    ("metal", "mistral", "8 bits", None),
    ("metal", "gpt_oss", "float32", None),
    ("cuda", "llama", "float32", None),
    ("cuda", "qwen", "bfloat16", 8),
    ("cuda", "mistral", "4 bits", None),
    ("cuda", "recurrent", "float32", None),
    ("cuda", "deepseek_v3", "float32", None),
]


@pytest.mark.parametrize(
    ("device", "kind", "numbers", "kv_bits"),
    [*OFTEN, *(pytest.param(*one, marks=pytest.mark.soak) for one in SELDOM)],
)
def test_a_device_says_the_tokens_that_a_cpu_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    kind: str,
    numbers: str,
    kv_bits: int | None,
) -> None:
    path = stored_as(numbers, model_of(kind, tmp_path / kind))
    first = [*STREAMS, BOUND] if kind in FAMILIES else STREAMS
    memory = DeviceMemory("50%", None)
    options = LoadOptions(dequantize="never", kv_bits=kv_bits)
    expected = said(Backend(path, options, memory), memory, first)
    force(monkeypatch, device)
    backend = Backend(path, options, memory)
    assert not backend.eager
    assert said(backend, memory, first) == expected


def said(backend: Backend, memory: DeviceMemory, first: list[Generate]) -> dict[int, Any]:
    from mlx_server.engine.cache.prefix import PrefixCache

    prefix = PrefixCache(backend.layout, 1 << 24)
    scheduler = Scheduler(backend, memory, prefix, max_batch=16, kv_limit=1 << 28, prefill_chunk=24)
    tokens = tokens_of(scheduler, first, list(LATE))
    mixed = scheduler.pace.mixed.tokens_within(1.0, 0) > 0
    assert mixed == backend.mixes, "chunks and steps were not computed as they can be"
    return tokens


def force(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Have all of the engine take MLX's device for another, with none of a CPU's kernels."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_server.engine") and hasattr(module, "device_name"):
            monkeypatch.setattr(module, "device_name", lambda: device)
        if name.startswith("mlx_lm.models") and hasattr(module, "swiglu"):
            monkeypatch.setattr(module, "swiglu", activations._swiglu)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention._attention)
    monkeypatch.setattr(mx, "quantized_matmul", mx.quantized_matmul)  # so that it is put back
    monkeypatch.setattr(cuda, "fewest_rows", lambda: cuda.FEWEST_ROWS)
    monkeypatch.setattr(cuda, "WIDE", 0)
    monkeypatch.setattr(cuda, "WORTH_ZEROS", 0)


def model_of(kind: str, folder: Path) -> Path:
    if kind == "recurrent":
        return build_recurrent_model(folder)
    if kind in FAMILIES:
        return build_tiny_model(folder, kind, hidden=128)
    return build_architecture(folder, kind)


def stored_as(numbers: str, folder: Path) -> Path:
    """The model with its weights in other numbers."""
    if numbers == "float32":
        return folder
    model, config = load_model(folder)
    if numbers == "bfloat16":
        model.set_dtype(mx.bfloat16)
    else:
        settings = {"group_size": 32, "bits": int(numbers.split()[0])}
        quantize(model, **settings)
        (folder / "config.json").write_text(json.dumps(config | {"quantization": settings}))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
