"""A model of which each rank has layers of its own; what holds for all ranks is in `test_ranks`."""

from pathlib import Path

import msgspec
import pytest

from mlx_server.engine.protocol import LoadOptions, Sharing
from mlx_server.errors import ModelLoadFailed
from tests.engine.conftest import request, rows_of, started, tokens_of, until
from tests.engine.test_ranks import assert_same, mixed, ranks_here
from tests.support.architectures import VOCAB_SIZE, build_architecture
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_model

FAMILIES = {
    "deepseek_v3": 2,
    "qwen3_next": 2,
}
ONE_KIND = {"num_hidden_layers": 3}
"""Every other layer of the hybrids is recurrent, so that one of two ranks has nothing else."""
MORE_FAMILIES = {
    "qwen2": 4,
    "qwen3_moe": 2,
    "glm4_moe": 2,
    "qwen3_5": 3,
    "deepseek_v2": 2,
    "deepseek_v32": 2,
    "glm4_moe_lite": 3,
    "glm_moe_dsa": 2,
    "kimi_k25": 2,
    "minimax_m3_vl": 2,
    "ministral3": 3,
    "mistral4": 3,
    "bailing_hybrid": 2,
    "qwen3_5_moe": 3,
    "solar_open": 2,
}
SHARED = [(7 * i) % VOCAB_SIZE for i in range(100)]


@pytest.mark.parametrize("name", FAMILIES)
async def test_families_say_what_one_process_says(tmp_path: Path, name: str) -> None:
    more = ONE_KIND if name == "qwen3_next" else {}
    await assert_pipeline_says_the_same(tmp_path, name, FAMILIES[name], **more)


@pytest.mark.soak
@pytest.mark.parametrize("name", MORE_FAMILIES)
async def test_more_families_say_what_one_process_says(tmp_path: Path, name: str) -> None:
    await assert_pipeline_says_the_same(tmp_path, name, MORE_FAMILIES[name])


async def assert_pipeline_says_the_same(tmp_path: Path, name: str, ranks: int, **more: int) -> None:
    """Batched, with prefixes found and too few of them kept, and with guesses."""
    folder = build_architecture(tmp_path / name, name, **more)
    asked = mixed(4, VOCAB_SIZE, most=12)
    asked += [request([*SHARED, 50 + i], 8, logprobs=2) for i in range(2)]
    async with started(folder, prefix_cache=FEW_BLOCKS) as alone:
        expected = await rows_of(alone, *asked)
    answer = [token for row in expected[0] for token in row.tokens]
    asked[0] = msgspec.structs.replace(asked[0], prediction=[*answer[:6], 99, *answer[6:]])
    options = {"ranks": ranks, "division": "pipeline", "prefix_cache": FEW_BLOCKS}
    async with started(folder, guesses_always=True, **options) as divided:
        for _ in range(2):
            assert_same(await rows_of(divided, *asked), expected)
        assert passes(divided) == passes(alone)
        if passes(divided)[:2] == (Sharing.ANY, Sharing.ANY):
            await until(
                lambda: divided.stats and divided.stats.guessed > divided.stats.accepted > 0
            )


FEW_BLOCKS = "40KB"
"""The prompts have more."""


def passes(engine: DirectEngine) -> tuple[object, object, bool]:
    """Which requests may share one."""
    assert engine.ready is not None
    assert engine.ready.batching is not None
    batching, mixed = engine.ready.batching, engine.ready.mixed_steps
    return batching.decode, batching.prefill, mixed == "on"


async def test_the_rest_of_the_layers_is_never_read(tmp_path: Path) -> None:
    folder = build_tiny_model(
        tmp_path / "wide", "qwen", context=512, layers=6, hidden=256, model_type="qwen2"
    )
    weights = (folder / "model.safetensors").stat().st_size
    async with started(folder, ranks=3, division="pipeline", prefix_cache="0") as divided:
        assert divided.ready is not None
        ends = 2 * divided.ready.vocab_size * 256 * 4
        part = ends + (weights - ends) / 3
        await tokens_of(divided, request([5, 6, 7]))

        def a_third() -> bool:
            parts = [one.memory for one in divided.stats.ranks] if divided.stats else []
            return len(parts) == 3 and all(
                memory is not None
                and memory.active == pytest.approx(part, rel=0.02)
                and memory.peak < 0.8 * weights  # with caches of what was tried at first
                for memory in parts
            )

        await until(a_third)


async def test_heads_that_ranks_cannot_share_leave_whole_layers(tmp_path: Path) -> None:
    folder = build_architecture(tmp_path / "qwen2", "qwen2")
    asked = mixed(4, VOCAB_SIZE, most=12)
    async with started(folder) as alone:
        expected = await rows_of(alone, *asked)
    async with started(folder, ranks=3) as divided:
        assert_same(await rows_of(divided, *asked), expected)


@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("gemma2", 2, "models of type gemma2 cannot be divided by layers"),
        ("qwen2", 5, "5 ranks cannot share its 4 layers"),
        ("bailing_hybrid", 3, "its layers cannot be divided among 3 ranks: "),
    ],
)
async def test_what_cannot_be_divided_is_named(
    tmp_path: Path, name: str, ranks: int, says: str
) -> None:
    others = ranks_here()
    folder = build_architecture(tmp_path / name, name)
    with pytest.raises(ModelLoadFailed, match=says):
        await DirectEngine.start("tiny", folder, LoadOptions(ranks=ranks, division="pipeline"))
    await until(lambda: ranks_here() == others)


async def test_quantized_caches_are_those_of_each_ranks_layers(tmp_path: Path) -> None:
    folder = build_architecture(tmp_path / "qwen2", "qwen2", head_dim=32, hidden_size=128)
    asked = mixed(6, VOCAB_SIZE, most=24)
    async with started(folder, kv_bits=8) as alone:
        expected = await rows_of(alone, *asked)
    async with started(folder, kv_bits=8, ranks=2, division="pipeline") as divided:
        # Rounding may take a number to the next of the 256 steps.
        assert_same(await rows_of(divided, *asked), expected, near=0.02)
