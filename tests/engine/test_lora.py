"""LoRA adapters: the engine's output is that of mlx-lm with the same adapter."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import dequantize_model, load_model

from mlx_server.engine.protocol import LoadOptions
from mlx_server.errors import ModelLoadFailed
from tests.engine.conftest import request as generation
from tests.engine.conftest import tokens_of
from tests.support.engines import DirectEngine
from tests.support.tiny import build_quantized, build_tiny_adapter, build_tiny_model

PROMPT = [5, 17, 42, 99, 7]
TOKENS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("lora") / "base", hidden=64, context=512)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return build_quantized(base, tmp_path_factory.mktemp("lora"), bits=8, group_size=32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return build_tiny_adapter(base, tmp_path_factory.mktemp("lora") / "adapter")


async def said(path: Path, adapter: Path | None, dequantize: str) -> list[int]:
    options = LoadOptions(dequantize=dequantize)
    engine = await DirectEngine.start("tiny", path, options, adapter)
    try:
        (tokens,) = await tokens_of(engine, generation(PROMPT, TOKENS))
    finally:
        await engine.stop()
    return tokens


def said_by_mlx_lm(path: Path, adapter: Path, dequantize: str) -> list[int]:
    model, _ = load_model(path)
    model = load_adapters(model, str(adapter))
    model.eval()
    if dequantize == "always":
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("dequantize", ["never", "always"])
@pytest.mark.parametrize("kind", ["base", "quantized"])
async def test_an_adapted_model_says_what_it_says_in_mlx_lm(
    request: pytest.FixtureRequest, adapter: Path, kind: str, dequantize: str
) -> None:
    path: Path = request.getfixturevalue(kind)
    adapted = await said(path, adapter, dequantize)
    assert adapted == said_by_mlx_lm(path, adapter, dequantize)
    assert adapted != await said(path, None, dequantize)


async def test_an_adapter_of_another_model_is_refused_by_name(
    adapter: Path, tmp_path: Path
) -> None:
    other = build_tiny_model(tmp_path / "other", hidden=32)
    with pytest.raises(ModelLoadFailed, match="adapter in adapter cannot be applied"):
        await DirectEngine.start("other", other, LoadOptions(), adapter)


async def test_a_damaged_adapter_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"num_layers": 2}')
    with pytest.raises(ModelLoadFailed, match="cannot be applied"):
        await DirectEngine.start("base", base, LoadOptions(), tmp_path)
