"""A model divided among processes: the text of one process, and one end for all of them."""

import asyncio
import json
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import psutil
import pytest

from mlx_server.engine.cache.prefix import BLOCK
from mlx_server.engine.protocol import (
    Generate,
    LoadOptions,
    Logprobs,
    Nccl,
    Rdma,
    RdmaDevices,
    Row,
    Sampling,
)
from mlx_server.engine.ranks import ring
from mlx_server.engine.ranks.followers import gpus_of_ranks
from mlx_server.errors import LoadCrashed, ModelLoadFailed
from tests.engine.conftest import idle, request, rows_of, started, tokens_of, until
from tests.engine.test_grammar import grammar_of
from tests.support.architectures import VOCAB_SIZE, build_architecture
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_adapter, build_tiny_model

NEAR_TIE = 1e-3
FAMILIES = (
    *("qwen2", "qwen3", "qwen3_moe", "qwen3_5", "gpt_oss"),
    *("deepseek_v3", "ministral3", "glm4_moe"),
)
ADAPTED_FAMILIES = [
    pytest.param(name, marks=pytest.mark.soak)
    for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "ministral3", "glm4_moe")
]

FORM = grammar_of(
    {
        "type": "object",
        "properties": {"a_long_name": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a_long_name", "b"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return build_tiny_model(folder, "qwen", context=512, layers=LAYERS, model_type="qwen2")


LAYERS = 5
SHARES = {"tensor": [1 / 2, 1 / 2], "pipeline": [2 / LAYERS, 2 / LAYERS, 1 / LAYERS]}
"""What each rank has of what is divided, by way of division."""


@pytest.fixture(scope="module", params=SHARES)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
async def divided(model: Path, way: str) -> AsyncIterator[DirectEngine]:
    """Guesses whenever it can, so that all is tried with guesses too."""
    options = {"prefill_chunk": 16, "ranks": len(SHARES[way]), "division": way}
    async with started(model, guesses_always=True, **options) as client:
        yield client


@pytest.fixture(scope="module")
async def one(model: Path) -> AsyncIterator[DirectEngine]:
    async with started(model, prefill_chunk=16, speculation="off") as client:
        yield client


def mixed(count: int, vocabulary: int = 400, most: int = 40) -> list[Generate]:
    """Greedy and sampled, penalised and not, of all lengths; log-probabilities to judge ties by."""
    rng = random.Random(3)
    made = []
    for seed in range(count):
        sampling = Sampling(
            seed=seed,
            temperature=[0.0, 0.8, 1.0][seed % 3],
            top_p=[1.0, 0.9][seed % 2],
            repetition_penalty=[1.0, 1.2][seed // 2 % 2],
        )
        prompt = [rng.randrange(vocabulary) for _ in range(rng.choice([1, 5, 40, 90]))]
        scored = 1 if seed % 7 == 3 else None
        made.append(request(prompt, most, sampling, logprobs=2, prompt_logprobs=scored))
    return made


def assert_same(found: list[list[Row]], expected: list[list[Row]], near: float = NEAR_TIE) -> None:
    """The same tokens, up to where two were as likely; the same of the prompts."""
    for ours, theirs in zip(found, expected, strict=True):
        for mine, known in zip(entries(ours), entries(theirs), strict=True):
            if mine.token != known.token:
                top, ours_top = dict(known.top), dict(mine.top)
                common = top.keys() & ours_top.keys()
                assert common
                for token in common:
                    assert ours_top[token] == pytest.approx(top[token], abs=near)
                if {mine.token, known.token} <= top.keys():  # else it was drawn near a border
                    assert abs(top[mine.token] - top[known.token]) < near
                break
            assert mine.logprob == pytest.approx(known.logprob, abs=near)
        else:
            assert [row.finish for row in ours][-1] == [row.finish for row in theirs][-1]
        prompts = zip(ours[0].prompt_logprobs or [], theirs[0].prompt_logprobs or [], strict=True)
        for mine, known in prompts:
            assert (mine is None) == (known is None)
            if mine and known:
                assert mine.logprob == pytest.approx(known.logprob, abs=near)


def entries(rows: list[Row]) -> list[Logprobs]:
    return [entry for row in rows for entry in row.logprobs or []]


# the same text


async def test_a_batch_gets_the_text_of_one_process(
    divided: DirectEngine, one: DirectEngine
) -> None:
    asked = mixed(12)
    assert_same(await rows_of(divided, *asked), await rows_of(one, *asked))


async def test_prefixes_are_found_where_one_process_finds_them(
    divided: DirectEngine, one: DirectEngine, way: str
) -> None:
    shared = [(7 * i + len(way)) % 400 for i in range(130)]  # new to the one as well
    asked = [request([*shared, 50 + i], 12, logprobs=2) for i in range(4)]
    longer = [msgspec.structs.replace(each, prompt=[*each.prompt, 3, 4]) for each in asked]
    for requests in (asked, longer):
        found, expected = await rows_of(divided, *requests), await rows_of(one, *requests)
        assert_same(found, expected)
    # At first it depends on how far the first prompt is when the others begin.
    cached = [rows[0].cached for rows in found]
    assert cached == [rows[0].cached for rows in expected]
    assert min(count or 0 for count in cached) >= 128


async def test_grammars_are_kept_with_and_without_a_stop_token(
    divided: DirectEngine, one: DirectEngine
) -> None:
    asked = [
        request([5 + i, 6, 7], 40, Sampling(temperature=i % 2, seed=i), grammar=FORM, logprobs=2)
        for i in range(3)
    ]
    # Nothing goes on where the grammar leaves no token: the others must not mind.
    asked += [request([9, 9], 20, logprobs=2), request([8], 10, grammar="start: /a{3}/")]
    found, expected = await rows_of(divided, *asked), await rows_of(one, *asked)
    assert_same(found, expected)
    assert found[-1][-1].finish == expected[-1][-1].finish == "stop"


async def test_guesses_change_nothing(divided: DirectEngine, one: DirectEngine) -> None:
    repeated = [11, 12, 13, 14, 15, 16, 17, 18] * 8
    asked = [
        request(repeated, 60, logprobs=2),
        request([5, 6], 30, Sampling(temperature=1, seed=4), logprobs=2),
        request([7, 8, 9], 30, grammar=FORM, logprobs=2),
    ]
    expected = await rows_of(one, *asked)
    answer = [token for row in expected[1] for token in row.tokens]
    asked[1] = msgspec.structs.replace(asked[1], prediction=[*answer[:12], 99, *answer[12:]])
    await idle(divided)
    assert divided.stats is not None
    guessed, accepted = divided.stats.guessed, divided.stats.accepted
    assert_same(await rows_of(divided, *asked), expected)

    def counted() -> bool:
        stats = divided.stats
        return stats is not None and stats.guessed - guessed > stats.accepted - accepted > 12

    await until(counted)


async def test_aborts_free_the_rows_of_all_ranks(divided: DirectEngine, one: DirectEngine) -> None:
    for _ in range(3):
        with divided.generate(mixed(6, most=300)) as stream:
            async for _ in stream.rows():
                break
    await idle(divided)
    asked = mixed(4)
    assert_same(await rows_of(divided, *asked), await rows_of(one, *asked))
    assert divided.stats is not None
    assert divided.stats.kv_bytes == 0


async def test_what_was_computed_is_taken_up_from_the_disks_as_far_as_all_ranks_have_it(
    model: Path, one: DirectEngine, way: str, tmp_path: Path
) -> None:
    disks = {"disk_cache_folder": str(tmp_path), "disk_cache_limit": 1 << 30}
    options = {**disks, "ranks": len(SHARES[way]), "division": way}
    asked = request([(11 * i + 5) % 400 for i in range(7 * BLOCK + 5)], 12, logprobs=2)
    expected = await rows_of(one, asked)
    async with started(model, **options) as engine:
        await rows_of(engine, asked)
    async with started(model, **options) as engine:
        found = await rows_of(engine, asked)
        assert found[0][0].cached == 7 * BLOCK
        assert_same(found, expected)
    lose_blocks_of_one_rank(tmp_path, len(SHARES[way]))
    async with started(model, **options) as engine:
        found = await rows_of(engine, asked)
        assert (found[0][0].cached or 0) < 7 * BLOCK
        assert_same(found, expected)


def lose_blocks_of_one_rank(disk: Path, ranks: int) -> None:
    parts = sorted(path for path in disk.iterdir() if path.is_dir())
    assert len(parts) == ranks
    for file in sorted(parts[-1].rglob("*.safetensors"))[:2]:
        file.unlink()


@pytest.mark.soak
@pytest.mark.parametrize("name", FAMILIES)
async def test_families_compute_the_same(tmp_path: Path, name: str) -> None:
    folder = build_architecture(tmp_path / name, name)
    asked = mixed(8, VOCAB_SIZE, most=24)
    async with started(folder) as alone:
        expected = await rows_of(alone, *asked)
    async with started(folder, ranks=2) as divided:
        assert_same(await rows_of(divided, *asked), expected)


@pytest.mark.parametrize("name", ["qwen3_5", *ADAPTED_FAMILIES])
async def test_an_adapted_model_says_what_one_process_says(tmp_path: Path, name: str) -> None:
    await assert_adapted_says_the_same(tmp_path, name, "tensor")


@pytest.mark.soak
async def test_an_adapted_model_may_be_divided_by_layers(tmp_path: Path) -> None:
    await assert_adapted_says_the_same(tmp_path, "qwen2", "pipeline")


async def assert_adapted_says_the_same(tmp_path: Path, name: str, way: str) -> None:
    folder = build_architecture(tmp_path / name, name)
    adapter = build_tiny_adapter(folder, tmp_path / "adapter")
    asked = mixed(6, VOCAB_SIZE, most=16)
    async with started(folder) as plain:
        unadapted = await rows_of(plain, *asked)
    async with started(folder, adapter=adapter) as alone:
        expected = await rows_of(alone, *asked)
    assert [row.tokens for row in expected[0]] != [row.tokens for row in unadapted[0]]
    async with started(folder, adapter=adapter, ranks=2, division=way) as divided:
        assert_same(await rows_of(divided, *asked), expected)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("llama", "dora", "DoRA needs all of a module's weights"),
        pytest.param("gpt_oss", "lora", "reaches into adapted modules", marks=pytest.mark.soak),
    ],
)
async def test_an_adapter_that_ranks_cannot_share_is_refused(
    tmp_path: Path, name: str, kind: str, why: str
) -> None:
    folder = build_architecture(tmp_path / name, name)
    adapter = build_tiny_adapter(folder, tmp_path / "adapter", kind=kind)
    with pytest.raises(ModelLoadFailed, match=why):
        await DirectEngine.start("tiny", folder, LoadOptions(ranks=2), adapter)


@pytest.mark.soak
async def test_three_ranks_and_quantized_caches(tmp_path: Path) -> None:
    folder = build_architecture(tmp_path / "llama", "llama", **THREE)
    asked = mixed(6, VOCAB_SIZE, most=24)
    async with started(folder, kv_bits=8) as alone:
        expected = await rows_of(alone, *asked)
    async with started(folder, kv_bits=8, ranks=3) as divided:
        # Rounding may take a number to the next of the 256 steps.
        assert_same(await rows_of(divided, *asked), expected, near=0.02)
        assert divided.stats is not None
        assert [rank.rank for rank in divided.stats.ranks] == [0, 1, 2]


THREE = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 3),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
}


# memory


async def test_each_rank_holds_its_part(divided: DirectEngine, one: DirectEngine, way: str) -> None:
    assert one.ready is not None
    assert divided.ready is not None
    whole = one.ready.weights_bytes
    ends = 2 * one.ready.vocab_size * WIDTH * 4  # of embeddings and the output projection
    parts = [ends + (whole - ends) * share for share in SHARES[way]]
    assert divided.ready.weights_bytes == pytest.approx(max(parts), rel=0.02)
    await tokens_of(divided, *mixed(4))

    def settled() -> bool:
        """Once all have told what they use when nothing runs."""
        if divided.stats is None:
            return False
        active = [rank.memory.active for rank in divided.stats.ranks if rank.memory]
        # With a prefix cache, of which each has a part.
        most = whole + divided.stats.prefix.bytes + SMALL
        return (
            len(active) == len(parts)
            and sum(active) == divided.stats.memory.active
            and all(0.98 * part < used < most for part, used in zip(parts, active, strict=True))
        )

    await until(settled)


WIDTH = 32
SMALL = 1 << 17
"""Bytes of what is kept beside weights and caches."""


# ends


async def test_all_ranks_end_when_the_front_does_even_a_stopped_one(model: Path) -> None:
    async with mortal(model) as client:
        engine = psutil.Process(client.pid)
        [rank] = engine.children()
        rank.send_signal(signal.SIGSTOP)
        client._child.writer.close()
        await until(lambda: gone(engine) and gone(rank), 2.0)


@pytest.mark.soak
async def test_a_rank_that_is_killed_ends_the_engine_as_it_ended(model: Path) -> None:
    async with mortal(model) as client:
        [rank] = psutil.Process(client.pid).children()
        rank.send_signal(signal.SIGKILL)
        await asyncio.wait_for(client.closed.wait(), 5)
        await client.process.wait()
        assert client.how_it_ended == "signal 9"


@pytest.mark.soak
async def test_a_stopped_rank_goes_when_rank_0_dies(model: Path) -> None:
    async with mortal(model) as client:
        [rank] = psutil.Process(client.pid).children()
        rank.send_signal(signal.SIGSTOP)
        os.kill(client.pid, signal.SIGKILL)
        await asyncio.wait_for(client.closed.wait(), 5)
        await until(lambda: gone(rank))


async def test_a_load_that_a_rank_does_not_survive_has_crashed(model: Path) -> None:
    others = ranks_here()
    starting = asyncio.create_task(DirectEngine.start("tiny", model, LoadOptions(ranks=2)))
    await until(lambda: ranks_here() - others)
    for rank in ranks_here() - others:
        rank.kill()
    with pytest.raises(LoadCrashed):
        await starting
    await until(lambda: ranks_here() == others)


@pytest.mark.soak
async def test_a_family_that_mlx_lm_cannot_divide_is_named(tmp_path: Path) -> None:
    others = ranks_here()
    folder = build_architecture(tmp_path / "gemma2", "gemma2")
    with pytest.raises(ModelLoadFailed, match="no way to divide models of type gemma2 among 2"):
        await DirectEngine.start("tiny", folder, LoadOptions(ranks=2))
    await until(lambda: ranks_here() == others)


def mortal(model: Path) -> Any:
    return started(model, steps_may_fail=True, ranks=2)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ranks_here() -> set[psutil.Process]:
    return {one for one in psutil.Process().children(recursive=True) if is_rank(one)}


def is_rank(process: psutil.Process) -> bool:
    try:
        return "mlx_server.engine.follower" in process.cmdline()
    except psutil.Error:
        return False


def test_nccl_is_asked_for_as_mlx_s_launcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MLX_RANK", "MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT")
    asked = []
    for name in names:
        monkeypatch.setenv(name, "unset")
    addresses = [["10.0.0.1:5000"], ["10.0.0.2:5000"]]
    with pytest.raises(ring.NoFabric, match="over NCCL, which MLX does not have there"):
        ring.join(1, addresses, Nccl())
    monkeypatch.setattr(mx.distributed, "is_available", lambda backend: backend == "nccl")
    monkeypatch.setattr(
        mx.distributed,
        "init",
        lambda strict, backend: asked.append((backend, *map(os.environ.get, names))),
    )
    ring.join(1, addresses, Nccl())
    assert asked == [("nccl", "1", "2", "10.0.0.1", "5000")]


async def test_over_nccl_there_must_be_a_gpu_for_each_rank(model: Path) -> None:
    others = ranks_here()
    with pytest.raises(ModelLoadFailed, match="this machine has 0 for 2 of them"):
        await DirectEngine.start("tiny", model, LoadOptions(ranks=2, ranks_over="nccl"))
    await until(lambda: ranks_here() == others)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, [None, "1", "2"]), ("4,5,6", [None, "5", "6"]), ("3", [None, "", ""])],
)
def test_each_rank_sees_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: list[str | None]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of_ranks(LoadOptions(ranks=3, ranks_over="nccl")) == gpus
    assert gpus_of_ranks(LoadOptions(ranks=3)) == [None] * 3


def test_rdma_is_asked_for_as_mlx_s_launcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX would read, where there is no such device to try it with."""
    devices: list[RdmaDevices] = [[None, "rdma_en2"], ["rdma_en3", None]]
    addresses = [["10.0.0.1:5000"], ["10.0.0.2:5000"]]
    asked = []

    def init(*, strict: bool, backend: str) -> None:
        read = json.loads(Path(os.environ["MLX_IBV_DEVICES"]).read_text())
        names = ("MLX_RANK", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING")
        asked.append((strict, backend, read, *map(os.environ.get, names)))

    for name in ("MLX_RANK", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "MLX_IBV_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ring.NoFabric, match="which MLX does not have there"):
        ring.join(1, addresses, Rdma(devices, around=False))
    monkeypatch.setattr(mx.distributed, "is_available", lambda backend: backend == "jaccl")
    monkeypatch.setattr(mx.distributed, "init", init)
    for around in (False, True):
        ring.join(1, addresses, Rdma(devices, around))
    told = (True, "jaccl", devices, "1", "10.0.0.1:5000")
    assert asked == [(*told, None), (*told, "1")]


def test_an_address_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind((ring.LOOPBACK, 0))
        taken.listen()
        address = f"{ring.LOOPBACK}:{taken.getsockname()[1]}"
        with pytest.raises(ring.RingError, match=f"rank 0 cannot listen on {address}"):
            ring.join(0, [[address], ring.free_addresses([ring.LOOPBACK])])


def test_free_addresses_differ() -> None:
    addresses = ring.free_addresses([ring.LOOPBACK] * 8)
    assert len(set(addresses)) == 8


@pytest.fixture(autouse=True)
def _ring_of_nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has tried to join a ring must not take later tests for ranks."""
    yield
    for name in ("MLX_RANK", "MLX_HOSTFILE"):
        os.environ.pop(name, None)
