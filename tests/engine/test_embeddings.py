"""Vectors of texts: the same whatever else goes through the model, and those of the formulae."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from mlx_server.engine.protocol import Embed, Embedding, LoadOptions, PoolingMode
from mlx_server.errors import EngineFailed, ModelLoadFailed
from mlx_server.models.pool.resumable import ResumableEngine
from mlx_server.models.pool.supervisor import EngineSupervisor
from tests.engine.conftest import idle, request
from tests.support.bert import ReferenceEncoder, build_tiny_bert, unit, wordpiece
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_model

Floats = NDArray[np.float64]

CONTEXT = 128
MEAN = Embedding(["mean"], normalize=True)
TOLERANCE = 1e-5
WAYS: dict[PoolingMode, Callable[[Floats], Floats]] = {
    "cls": lambda states: states[0],
    "max": lambda states: states.max(axis=0),
    "mean": lambda states: states.mean(axis=0),
    "mean_sqrt_len": lambda states: states.sum(axis=0) / len(states) ** 0.5,
    "weighted_mean": lambda states: np.average(states, axis=0, weights=range(1, len(states) + 1)),
    "last": lambda states: states[-1],
}


@asynccontextmanager
async def started(
    path: Path, embedding: Embedding = MEAN, **options: object
) -> AsyncIterator[DirectEngine]:
    client = await DirectEngine.start("tiny", path, LoadOptions(**options), embedding=embedding)
    try:
        yield client
    finally:
        await client.stop()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bert(tmp_path_factory.mktemp("models") / "bert", context=CONTEXT)


@pytest.fixture(scope="module")
async def engine(bert: Path) -> AsyncIterator[DirectEngine]:
    async with started(bert) as client:
        yield client


def texts(count: int, longest: int = CONTEXT, seed: int = 0) -> list[list[int]]:
    """Random tokens of random lengths, most of them short."""
    chance = random.Random(seed)
    size = wordpiece().get_vocab_size()
    lengths = [1 + int((longest - 1) * chance.random() ** 3) for _ in range(count)]
    return [[chance.randrange(5, size) for _ in range(length)] for length in lengths]


async def vectors_of(
    engine: DirectEngine, wanted: Sequence[Sequence[int]], dimensions: int | None = None
) -> list[Floats]:
    """The vector of each text, asked for at once."""
    found: dict[int, Floats] = {}
    request = Embed(0, [list(text) for text in wanted], dimensions)
    with engine.generate([request]) as stream:
        async for _, row in stream.rows():
            for index, numbers in row.vectors or ():
                assert index not in found, "a vector came twice"
                found[index] = np.frombuffer(numbers, "<f4").astype(np.float64)
    return [found[index] for index in range(len(wanted))]


# what is computed


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
async def test_every_way_of_pooling_is_that_of_the_formulae(
    tmp_path: Path, model_type: str
) -> None:
    folder = build_tiny_bert(tmp_path / "model", model_type=model_type, context=CONTEXT)
    reference = ReferenceEncoder(folder)
    asked = [*texts(20), [7] * CONTEXT]
    async with started(folder, Embedding(list(WAYS), normalize=False)) as engine:
        assert engine.ready is not None
        assert engine.ready.width == len(WAYS) * reference.width
        assert engine.ready.context_length == CONTEXT
        vectors = await vectors_of(engine, asked)
    for text, vector in zip(asked, vectors, strict=True):
        states = reference.states(text)
        for way, ours in zip(WAYS, np.split(vector, len(WAYS)), strict=True):
            assert np.abs(ours - WAYS[way](states)).max() < 5 * TOLERANCE, (way, len(text))


async def test_a_vector_does_not_depend_on_what_goes_along(
    engine: DirectEngine, bert: Path
) -> None:
    reference = ReferenceEncoder(bert)
    asked = texts(300)
    together = await vectors_of(engine, asked)
    for text, vector in list(zip(asked, together, strict=True))[::10]:
        [alone] = await vectors_of(engine, [text])
        assert np.abs(alone - vector).max() < TOLERANCE
        assert np.abs(alone - reference.mean(text)).max() < TOLERANCE


async def test_fewer_dimensions_are_the_first_ones_at_length_1(engine: DirectEngine) -> None:
    asked = texts(3)
    whole = await vectors_of(engine, asked)
    short = await vectors_of(engine, asked, dimensions=5)
    for long, vector in zip(whole, short, strict=True):
        assert np.abs(vector - unit(long[:5])).max() < TOLERANCE


@pytest.mark.parametrize("family", ["qwen", "gemma"])
async def test_a_decoders_last_token_is_that_of_its_own_body(tmp_path: Path, family: str) -> None:
    folder = build_tiny_model(tmp_path / "model", family)
    model, _ = load_model(folder)
    without_head(folder)
    asked = texts(20, longest=90)
    async with started(folder, Embedding(["last"], normalize=True)) as engine:
        vectors = await vectors_of(engine, asked)
    for text, vector in zip(asked, vectors, strict=True):
        states = np.array(model.model(mx.array([text])))[0].astype(np.float64)
        assert np.abs(vector - unit(states[-1])).max() < TOLERANCE


def without_head(folder: Path) -> None:
    """Leave a model's body alone in its file, under names without `model.`, as some publish it."""
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    body = {
        name.removeprefix("model."): weight + 0
        for name, weight in weights.items()
        if not name.startswith("lm_head")
    }
    mx.eval(body)
    mx.save_safetensors(str(file), body, metadata={"format": "mlx"})


# how work is shared


@pytest.mark.parametrize("caller", ["the same", "another"])
async def test_a_small_request_does_not_wait_for_a_large_one(
    engine: DirectEngine, caller: str
) -> None:
    large = Embed(0, texts(2000), caller="the same")
    small = Embed(0, [[5] * CONTEXT], caller=caller)
    with engine.generate([large, small]) as stream:
        finished = [index async for index, row in stream.rows() if row.finish]
    assert finished == [1, 0]


async def test_an_aborted_request_is_forgotten(engine: DirectEngine) -> None:
    with engine.generate([Embed(0, texts(2000))]) as stream:
        async for _ in stream.rows():
            break
    await idle(engine)
    assert engine.in_flight == 0


async def test_texts_that_are_empty_are_passed_over(engine: DirectEngine) -> None:
    found = []
    with engine.generate([Embed(0, [[], [5, 6], [], [7]])]) as stream:
        async for _, row in stream.rows():
            found += [index for index, _ in row.vectors or ()]
    assert sorted(found) == [1, 3]


# what goes wrong


async def test_the_next_engine_makes_what_the_last_one_did_not(bert: Path) -> None:
    async def start(kv_share: float) -> DirectEngine:
        options = LoadOptions(kv_share=kv_share)
        return await DirectEngine.start("tiny", bert, options, embedding=MEAN)

    asked = texts(2000)
    found: dict[int, bytes] = {}
    counts: Counter[int] = Counter()
    engine = ResumableEngine("tiny")
    supervisor = EngineSupervisor(await start(1.0), engine.replicas[0], start, hang_timeout=60)
    supervision = asyncio.create_task(supervisor.run(wanted=lambda: True))
    try:
        with engine.embed(Embed(0, asked), "a-request") as stream:
            async for _, row in stream.rows():
                if not found and supervisor.pid is not None:
                    os.kill(supervisor.pid, signal.SIGKILL)
                found |= dict(row.vectors or ())
                counts.update(index for index, _ in row.vectors or ())
        again = engine.embed(Embed(0, asked[:50]), "another")
        with again:
            undisturbed = {i: v async for _, row in again.rows() for i, v in row.vectors or ()}
        assert supervisor.restarts == 1
    finally:
        supervision.cancel()
        await asyncio.wait([supervision])
        await supervisor.stop()
    assert counts == Counter(range(len(asked)))
    for index, vector in undisturbed.items():
        ours, theirs = (np.frombuffer(one, "<f4") for one in (found[index], vector))
        assert np.abs(ours - theirs).max() < TOLERANCE


async def test_a_text_that_cannot_be_computed_fails_its_request_alone(tmp_path: Path) -> None:
    folder = build_tiny_bert(tmp_path / "model")
    poison = 9
    spoil(folder, poison)
    asked = [[token for token in text if token != poison] or [5] for text in texts(200)]
    async with started(folder) as engine:
        good = vectors_of(engine, asked)
        bad = vectors_of(engine, [*asked[:50], [5, poison, 6]])
        vectors, failure = await asyncio.gather(good, bad, return_exceptions=True)
        assert isinstance(failure, EngineFailed)
        assert "not finite" in failure.message
        assert not isinstance(vectors, BaseException)
        assert len(vectors) == 200
        await idle(engine)


def spoil(folder: Path, token: int) -> None:
    """Make one token's embedding no number."""
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    weights = {name: weight + 0 for name, weight in weights.items()}
    weights["embeddings.word_embeddings.weight"][token] = mx.nan
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Embed(0, []), "no text"),
        (Embed(0, [[5] * (CONTEXT + 1)]), "context"),
        (Embed(0, [[5], [100_000]]), "vocabulary"),
        (Embed(0, [[5]], dimensions=33), "dimensions"),
        (request([5, 6]), "generates nothing"),
    ],
)
async def test_what_the_model_cannot_do_is_refused(
    engine: DirectEngine, asked: Embed, reason: str
) -> None:
    with pytest.raises(EngineFailed, match=reason), engine.generate([asked]) as stream:
        async for _ in stream.rows():
            pass


async def test_a_decoder_made_to_look_ahead_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"is_causal": false, ', 1))
    with pytest.raises(ModelLoadFailed, match="looks ahead"):
        async with started(folder):
            pass
