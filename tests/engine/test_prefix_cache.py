"""What is computed once is not computed again, and nobody can tell from the text."""

import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_server.engine.cache.blocks import LEAST_TAIL, Block, BlockIndex, Charge
from mlx_server.engine.cache.prefix import BLOCK, extend_keys
from mlx_server.engine.protocol import Generate, PrefixStats, Row, Sampling, Stats
from tests.engine.conftest import idle, request, rows_of, started, tokens_of, until
from tests.support.engines import DirectEngine
from tests.support.tiny import build_recurrent_model, build_tiny_model

Build = Callable[[Path], Path]

MODELS: dict[str, tuple[Build, dict[str, object]]] = {
    "attention": (lambda folder: build_tiny_model(folder), {}),
    "sliding window": (lambda folder: build_tiny_model(folder, "gemma"), {}),
    "recurrent": (build_recurrent_model, {}),
    "quantized": (lambda folder: build_tiny_model(folder, hidden=128), {"kv_bits": 8}),
}

NOTHING = PrefixStats(0, 0, 0, 0)
SLICEABLE = ("attention", "quantized")
"""Those of whose caches every layer can be cut into blocks."""


@pytest.fixture(scope="module", params=list(MODELS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    build, options = MODELS[request.param]
    return build(tmp_path_factory.mktemp("models") / request.param), options


@pytest.fixture(scope="module")
async def plain(model: tuple[Path, dict[str, object]]) -> AsyncIterator[DirectEngine]:
    """An engine that keeps nothing."""
    path, options = model
    async with started(path, prefix_cache="0", **options) as engine:
        yield engine


@pytest.fixture(scope="module")
async def engine(model: tuple[Path, dict[str, object]]) -> AsyncIterator[DirectEngine]:
    """An engine with a prefix cache, which knows nothing of prompts that no test before had."""
    path, options = model
    async with started(path, **options) as engine:
        yield engine


def prompt_of(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 400) for _ in range(length)]


def settings(seed: int) -> Sampling:
    return Sampling(temperature=0 if seed % 2 else 0.8, seed=seed)


def cached(rows: list[Row]) -> int:
    """Prompt tokens that did not have to be computed, as the request was told."""
    return next(row.cached for row in rows if row.cached is not None)


def tokens(rows: list[Row]) -> list[int]:
    return [token for row in rows for token in row.tokens]


async def alone(engine: DirectEngine, *requests: Generate) -> list[list[int]]:
    """What each of these gives when it has the engine to itself."""
    return [(await tokens_of(engine, one))[0] for one in requests]


async def after(engine: DirectEngine, *asked: Generate, before: PrefixStats = NOTHING) -> Stats:
    """What the engine reports when it has ended exactly these requests since, and is idle."""
    length = before.prompt_tokens + sum(len(one.prompt) for one in asked)

    def told() -> bool:
        s = engine.stats
        return s is not None and s.prefix.prompt_tokens == length and not s.running

    await until(told)
    assert engine.stats is not None
    return engine.stats


async def so_far(engine: DirectEngine) -> PrefixStats:
    await idle(engine)
    assert engine.stats is not None
    return engine.stats.prefix


def prompt_blocks(prompt: list[int], numbers: int = 1) -> list[Block]:
    """The whole blocks of a prompt, of so many numbers of 4 bytes each."""
    keys: list[bytes] = []
    extend_keys(keys, prompt)
    return [
        Block(key, parent, prompt[i * BLOCK : (i + 1) * BLOCK], [mx.zeros(numbers)])
        for i, (key, parent) in enumerate(zip(keys, [b"", *keys], strict=False))
    ]


def index_of(*chains: list[Block]) -> BlockIndex:
    """An index whose last chain is the most recently used."""
    index = BlockIndex()
    for chain in chains:
        for block in chain:
            index.add(block)
        index.touch(chain)
    return index


def held(index: BlockIndex, chain: list[Block]) -> int:
    return index.known([block.key for block in chain])


class TestBlockIndex:
    def test_shrinking_drops_the_longest_unused_prompt_from_its_end(self) -> None:
        old, new = prompt_blocks(prompt_of(96, 1)), prompt_blocks(prompt_of(96, 2))
        index = index_of(new, old)
        index.touch(new)
        index.shrink(16)
        assert (held(index, old), held(index, new)) == (1, 3)
        index.shrink(8)
        assert (held(index, old), held(index, new)) == (0, 2)
        assert index.nbytes == 8
        assert len(index) == 2

    def test_pinned_blocks_stay_until_the_last_pin_is_gone(self) -> None:
        chain = prompt_blocks(prompt_of(96, 1))
        index = index_of(chain)
        index.pin(chain[:2])
        index.pin(chain[:1])
        index.shrink(0)
        assert held(index, chain) == 2
        index.unpin(chain[:2])
        index.shrink(0)
        assert held(index, chain) == 1
        index.unpin(chain[:1])
        index.shrink(0)
        assert len(index) == index.nbytes == 0

    def test_ranks_with_other_layers_drop_the_same_blocks(self) -> None:
        kept = []
        for numbers in (1, 40):
            index = BlockIndex(Charge(block=4, snapshot=2).of)
            chains = [prompt_blocks(prompt_of(96, seed), numbers) for seed in (1, 2)]
            for block in (*chains[0], *chains[1]):
                index.add(block)
            index.add_snapshot(chains[0][0], [mx.zeros(numbers)])
            assert index.nbytes == 26
            dropped = index.shrink(16)
            assert index.nbytes <= 16
            kept.append(([block.key for block in dropped], [held(index, one) for one in chains]))
        assert kept[0] == kept[1]

    def test_a_snapshot_counts_with_its_block(self) -> None:
        chain = prompt_blocks(prompt_of(64, 1))
        index = index_of(chain)
        index.add_snapshot(chain[1], [mx.zeros(10)])
        assert index.nbytes == 48
        index.shrink(4)
        assert index.nbytes == 4

    def test_the_tail_is_the_child_that_agrees_longest_and_long_enough(self) -> None:
        prompt = prompt_of(96, 1)
        short = prompt[: BLOCK + LEAST_TAIL] + prompt_of(BLOCK - LEAST_TAIL, 2)
        long = prompt[: BLOCK + 20] + prompt_of(BLOCK - 20, 3)
        parent, near = prompt_blocks(short)
        best = prompt_blocks(long)[1]
        index = index_of([parent, near, best])
        rest = prompt[BLOCK:]
        assert index.tail(parent.key, rest) == (best, 20)
        assert index.tail(parent.key, rest[: LEAST_TAIL - 1]) == (None, 0)
        assert index.tail(b"", rest) == (None, 0)


async def test_a_prompt_seen_before_is_computed_from_its_last_whole_block_on(
    engine: DirectEngine, plain: DirectEngine
) -> None:
    asked = [request(prompt_of(length, length), 12, settings(length)) for length in (97, 200, 330)]
    expected = await alone(plain, *asked)
    for number, one in enumerate(asked):
        [cold] = await rows_of(engine, one)
        [warm] = await rows_of(engine, one)
        assert tokens(cold) == tokens(warm) == expected[number]
        assert cached(cold) == 0
        length = len(one.prompt) - 1
        assert length - BLOCK < cached(warm) <= length


async def test_the_next_turn_of_a_chat_computes_little_more_than_its_new_message(
    model: tuple[Path, dict[str, object]], engine: DirectEngine, plain: DirectEngine
) -> None:
    first = request(prompt_of(150, 1), 70, settings(1))
    [answer] = await tokens_of(engine, first)
    turn = first.prompt + answer
    second = request(turn + prompt_of(20, 2), 12, settings(2))
    [rows] = await rows_of(engine, second)
    assert [tokens(rows)] == await alone(plain, second)
    # Layers that cannot be cut are kept as they were after the prompt, not after the answer.
    known = len(turn) if model[0].name in SLICEABLE else len(first.prompt)
    assert cached(rows) > known - 1 - BLOCK


async def test_prompts_that_begin_alike_and_come_together_share_the_work(
    engine: DirectEngine, plain: DirectEngine
) -> None:
    system = prompt_of(300, 3)
    asked = [request(system + prompt_of(20 + i, 10 + i), 12, settings(i)) for i in range(8)]
    expected = await alone(plain, *asked)
    before = await so_far(engine)
    assert await tokens_of(engine, *asked) == expected
    everything = sum(len(one.prompt) for one in asked)
    least = len(system) + sum(len(one.prompt) - len(system) for one in asked)
    assert everything > 2500
    stats = (await after(engine, *asked, before=before)).prefix
    computed = everything - (stats.cached_tokens - before.cached_tokens)
    assert computed <= least + len(asked) * BLOCK


async def test_the_cache_keeps_within_its_bytes_and_forgets_the_longest_unused(
    tmp_path: Path,
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    limit = 30 * BLOCK * per_token
    often = request(prompt_of(4 * BLOCK + 1, 0), 2)
    async with started(path, prefix_cache=str(limit)) as engine:
        [rows] = await rows_of(engine, often)
        for seed in range(1, 30):
            await rows_of(engine, request(prompt_of(3 * BLOCK + 5, seed), 2))
            [rows] = await rows_of(engine, often)
            assert cached(rows) == 4 * BLOCK
            assert engine.stats.prefix.bytes <= limit
        [rows] = await rows_of(engine, request(prompt_of(3 * BLOCK + 5, 1), 2))
        assert cached(rows) == 0
        [rows] = await rows_of(engine, request(prompt_of(3 * BLOCK + 5, 29), 2))
        assert cached(rows) == 3 * BLOCK


async def test_running_requests_take_the_room_of_the_cache_when_they_need_it(
    tmp_path: Path,
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    per_token = 2 * 2 * 2 * 8 * 4
    limit = 3000 * per_token
    async with started(path, kv_limit=limit) as engine:
        before = [request(prompt_of(400, seed), 2) for seed in range(12)]
        for one in before:
            await rows_of(engine, one)
        full = (await after(engine, *before)).prefix.bytes
        assert full > limit / 3
        together = [request(prompt_of(40, 50 + seed), 300, settings(seed)) for seed in range(6)]
        most = 0
        with engine.generate(together) as stream:
            async for _ in stream.rows():
                stats = engine.stats
                most = max(most, stats.kv_bytes + stats.prefix.bytes)
        assert most <= limit
        stats = await after(engine, *before, *together)
        assert stats.preempted == 0
        assert stats.prefix.bytes < full


async def test_an_aborted_request_leaves_what_it_computed_and_nothing_else(
    engine: DirectEngine, plain: DirectEngine
) -> None:
    one = request(prompt_of(200, 5), 500, settings(5))
    before = await so_far(engine)
    with engine.generate([one]) as stream:
        async for _ in stream.rows():
            break
    [rows] = await rows_of(engine, request(one.prompt, 12, settings(5)))
    assert cached(rows) > len(one.prompt) - 1 - BLOCK
    assert (await after(engine, one, one, before=before)).kv_bytes == 0
    assert [tokens(rows)] == await alone(plain, request(one.prompt, 12, settings(5)))


async def test_scored_prompts_are_computed_whole(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    async with started(path) as engine:
        prompt = prompt_of(100, 6)
        await rows_of(engine, request(prompt, 2))
        [rows] = await rows_of(engine, request(prompt, 2, prompt_logprobs=0))
        assert cached(rows) == 0
        assert len(rows[0].prompt_logprobs) == len(prompt)


async def test_a_restarted_engine_takes_up_what_the_one_before_had_computed(
    model: tuple[Path, dict[str, object]], plain: DirectEngine, tmp_path: Path
) -> None:
    path, options = model
    disk = {"disk_cache_folder": str(tmp_path / "disk"), "disk_cache_limit": 1 << 30}
    first = request(prompt_of(300, 7), 12, settings(7))
    async with started(path, **disk, **options) as engine:
        [before] = await rows_of(engine, first)
    async with started(path, **disk, **options) as engine:
        [after] = await rows_of(engine, first)
        assert cached(after) > len(first.prompt) - 1 - BLOCK
        assert tokens(after) == tokens(before)
    assert [tokens(before)] == await alone(plain, first)


@pytest.mark.parametrize("name", ["recurrent", "quantized"])
async def test_damage_to_any_file_of_the_disk_cache_never_changes_an_answer(
    tmp_path: Path, name: str
) -> None:
    build, options = MODELS[name]
    path = build(tmp_path / name)
    folder = tmp_path / "disk"
    disk = {"disk_cache_folder": str(folder), "disk_cache_limit": 1 << 30}
    asked = [request(prompt_of(300, seed), 12, settings(seed)) for seed in range(4)]
    async with started(path, **disk, **options) as engine:
        expected = [(await tokens_of(engine, one))[0] for one in asked]
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) >= 4 * (300 // BLOCK)
    generator = random.Random(8)
    for number, file in enumerate(files):
        damage(file, files[number - 1], generator)
    async with started(path, **disk, **options) as engine:
        assert await tokens_of(engine, *asked) == expected


async def test_the_files_of_one_model_are_never_taken_for_another_s(tmp_path: Path) -> None:
    disk = {"disk_cache_folder": str(tmp_path / "disk"), "disk_cache_limit": 1 << 30}
    one, other = (build_tiny_model(tmp_path / f"tiny-{seed}", seed=seed) for seed in (1, 2))
    asked = request(prompt_of(300, 9), 12, settings(9))
    async with started(one, **disk) as engine:
        await rows_of(engine, asked)
    async with started(other, **disk) as engine:
        [rows] = await rows_of(engine, asked)
    assert cached(rows) == 0
    async with started(other, prefix_cache="0") as engine:
        assert [tokens(rows)] == await alone(engine, asked)


def damage(file: Path, other: Path, generator: random.Random) -> None:
    """Do to a file what a failing disk, a full one or a clumsy person might."""
    data = bytearray(file.read_bytes())
    at = generator.randrange(len(data))
    kind = generator.randrange(4)
    if kind == 0:
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:] = bytes(len(data) - at)
    else:
        data = bytearray(other.read_bytes())
    file.write_bytes(data)
