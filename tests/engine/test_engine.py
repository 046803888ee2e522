"""What the front relies on an engine process for, shown on a real one."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_server.engine import spawn
from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import HEADER, LoadOptions, Row, Sampling
from mlx_server.errors import EngineFailed, ModelLoadFailed
from mlx_server.models.pool.device import find_device
from tests.engine.conftest import idle, request, rows_of, started, tokens_of, until
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_model

PROMPTS = [
    [(7 * i * j + 3) % 400 for j in range(1, length)]
    for i, length in enumerate([2, 3, 9, 10, 17, 18, 40, 70, 5, 200], start=1)
]


def greedy_by_mlx_lm(path: Path, prompt: list[int], count: int) -> list[int]:
    model, _ = load_model(path)
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


async def test_greedy_text_is_what_mlx_lm_gives_alone_and_in_a_mixed_batch(
    engine: DirectEngine, tiny_model: Path
) -> None:
    expected = [greedy_by_mlx_lm(tiny_model, prompt, 12) for prompt in PROMPTS]
    alone = [(await tokens_of(engine, request(prompt, 12)))[0] for prompt in PROMPTS]
    assert alone == expected
    together = await tokens_of(engine, *(request(prompt, 12) for prompt in PROMPTS))
    assert together == expected


async def test_a_seed_gives_the_same_tokens_alone_and_among_others(engine: DirectEngine) -> None:
    settings = [
        Sampling(temperature=1, seed=11),
        Sampling(temperature=0.8, top_p=0.9, seed=12),
        Sampling(temperature=1.2, top_k=40, repetition_penalty=1.3, seed=13),
        Sampling(temperature=1, min_p=0.02, presence_penalty=0.5, frequency_penalty=0.5, seed=14),
        Sampling(temperature=0),
        Sampling(temperature=1, seed=2**64 - 1),
        Sampling(temperature=1, seed=15, logit_bias={9: 3.0}),
    ]
    requests = [request(p, 24, s) for p, s in zip(PROMPTS, settings, strict=False)]
    alone = [(await tokens_of(engine, r))[0] for r in requests]
    assert await tokens_of(engine, *requests) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


async def test_requests_join_and_leave_a_running_batch_without_a_trace(
    engine: DirectEngine,
) -> None:
    generator = random.Random(1)
    requests = [
        request(PROMPTS[i % 10], 5 + 7 * i % 50, Sampling(temperature=1, seed=i)) for i in range(24)
    ]
    alone = [(await tokens_of(engine, r))[0] for r in requests]

    async def later(i: int) -> list[int]:
        for _ in range(generator.randrange(40)):
            await asyncio.sleep(0)
        return (await tokens_of(engine, requests[i]))[0]

    assert await asyncio.gather(*(later(i) for i in range(24))) == alone


async def test_a_request_goes_on_from_the_tokens_an_earlier_engine_sampled(
    engine: DirectEngine,
) -> None:
    sampling = Sampling(temperature=1, seed=3, repetition_penalty=1.2, frequency_penalty=0.4)
    prompt = PROMPTS[3]
    [whole] = await tokens_of(engine, request(prompt, 30, sampling))
    for cut in (1, 12, 29):
        resumed = request([*prompt, *whole[:cut]], 30 - cut, sampling, generated=cut)
        [tail] = await tokens_of(engine, resumed)
        assert whole[:cut] + tail == whole


async def test_a_stop_token_ends_a_request_and_is_its_last(engine: DirectEngine) -> None:
    [tokens] = await tokens_of(engine, request(PROMPTS[4], 20, Sampling(temperature=1, seed=4)))
    stop = tokens[7]
    first = tokens.index(stop)
    stopped = request(PROMPTS[4], 20, Sampling(temperature=1, seed=4), stop_tokens=[stop])
    [rows] = await rows_of(engine, stopped)
    assert [t for row in rows for t in row.tokens] == tokens[: first + 1]
    assert rows[-1].finish == "stop"


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_max_tokens_is_exact(engine: DirectEngine, count: int) -> None:
    [rows] = await rows_of(engine, request(PROMPTS[0], count))
    assert sum(len(row.tokens) for row in rows) == count
    assert rows[-1].finish == "length"


async def test_the_context_bounds_a_completion(engine: DirectEngine) -> None:
    prompt = [5] * 500
    [tokens] = await tokens_of(engine, request(prompt, 10_000))
    assert len(prompt) + len(tokens) == 512
    with pytest.raises(EngineFailed, match="context"):
        await tokens_of(engine, request([5] * 512, 1))


@pytest.mark.parametrize(
    "bad", [request([], 5), request([512_000], 5), request([1], 5, Sampling(logit_bias={-1: 1.0}))]
)
async def test_what_cannot_run_fails_by_itself(engine: DirectEngine, bad: object) -> None:
    good = asyncio.create_task(tokens_of(engine, request(PROMPTS[5], 30)))
    with pytest.raises(EngineFailed):
        await tokens_of(engine, bad)
    assert len((await good)[0]) == 30


async def test_log_probabilities_come_for_those_who_ask_and_match_the_model(
    engine: DirectEngine, tiny_model: Path
) -> None:
    prompt = PROMPTS[6]
    asking = request(prompt, 6, Sampling(temperature=1, seed=8), logprobs=3, prompt_logprobs=2)
    asked, other = await rows_of(engine, asking, request(prompt, 6))
    assert all(row.logprobs is None for row in other)
    tokens = [token for row in asked for token in row.tokens]
    model, _ = load_model(tiny_model)
    logits = np.array(model(mx.array([prompt + tokens]))[0].astype(mx.float32))
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    scored = asked[0].prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    assert [entry.token for entry in scored[1:]] == prompt[1:]
    for i, entry in enumerate(scored[1:]):
        assert entry.logprob == pytest.approx(expected[i, entry.token], abs=1e-4)
        assert [t for t, _ in entry.top] == list(np.argsort(-expected[i])[:2])
    for i, row in enumerate(asked):
        [entry] = row.logprobs
        at = len(prompt) - 1 + i
        assert entry.token == tokens[i]
        assert entry.logprob == pytest.approx(expected[at, tokens[i]], abs=1e-4)
        assert [v for _, v in entry.top] == pytest.approx(-np.sort(-expected[at])[:3], abs=1e-4)


async def test_a_prompt_can_be_scored_without_a_completion(engine: DirectEngine) -> None:
    [rows] = await rows_of(engine, request(PROMPTS[9], 0, prompt_logprobs=0))
    assert len(rows) == 1
    assert rows[0].finish == "length"
    assert len(rows[0].prompt_logprobs) == len(PROMPTS[9])
    [single] = await rows_of(engine, request([4], 0, prompt_logprobs=0))
    assert single[0].prompt_logprobs == [None]


async def test_an_abort_ends_decoding_and_prefill_and_frees_their_caches(
    tmp_path: Path,
) -> None:
    path = build_tiny_model(tmp_path / "long", context=100_000)
    async with started(path, prefill_chunk=64) as engine:
        await tokens_of(engine, request(PROMPTS[0], 5))
        await idle(engine)
        before = engine.stats.memory.active
        with engine.generate([request([3] * 60_000, 10), *[request(PROMPTS[1], 50_000)] * 3]) as s:
            async for index, row in s.rows():
                if index == 1 and row.tokens:
                    break
        await idle(engine)
        assert engine.stats.kv_bytes == 0
        assert engine.stats.memory.active - engine.stats.prefix.bytes <= before * 1.01


async def test_a_long_prompt_lets_running_streams_go_on(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "long", context=20_000)
    async with started(path, prefill_chunk=64) as engine:
        order: list[str] = []

        async def run(name: str, prompt: list[int], count: int) -> None:
            with engine.generate([request(prompt, count)]) as stream:
                async for _ in stream.rows():
                    order.append(name)

        short = asyncio.create_task(run("short", PROMPTS[0], 400))
        await until(lambda: len(order) > 5)
        await asyncio.gather(short, run("long", [3] * 6_400, 1))
        assert order.index("long") > 80, "some 100 chunks of prefill, a token of the other each"


async def test_short_prompts_and_a_long_one_do_not_wait_for_each_other(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "long", context=20_000)
    async with started(path, prefill_chunk=64, max_batch=8) as engine:
        served = 0

        async def keep_asking() -> None:
            nonlocal served
            while not long.done():
                await tokens_of(engine, request(PROMPTS[1], 1))
                served += 1

        long = asyncio.create_task(tokens_of(engine, request([3] * 6_400, 1)))
        await asyncio.gather(*(keep_asking() for _ in range(3)))
        await long
        assert served > 50, "about 100 chunks of prefill, and a short prompt after each"


async def test_a_dead_engine_is_noticed_at_once(tiny_model: Path) -> None:
    async with started(tiny_model) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        await asyncio.wait_for(engine.closed.wait(), 5)
        await engine.kill()
        assert engine.how_it_ended == "signal 9"


async def test_frames_that_exceed_the_sockets_buffers_many_times_arrive_whole(
    engine: DirectEngine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wordy = [request(200 * [i], 2, logprobs=20, prompt_logprobs=20) for i in range(1, 5)]
    expected = await rows_of(engine, *wordy)
    monkeypatch.setattr(spawn, "BUFFER_BYTES", 2048)
    async with started(tiny_model, prefill_chunk=16) as narrow:
        sent = await rows_of(narrow, *wordy)
    assert [tokens(rows) for rows in sent] == [tokens(rows) for rows in expected]
    assert all(len(rows[0].prompt_logprobs or []) == 200 for rows in sent)


def tokens(rows: list[Row]) -> list[int]:
    return [token for row in rows for token in row.tokens]


async def test_an_engine_gives_way_to_its_front_on_a_cpu(engine: DirectEngine) -> None:
    assert engine.ready is not None
    given = spawn.NICENESS if engine.ready.device == "cpu" else 0
    assert psutil.Process(engine.pid).nice() == min(19, psutil.Process().nice() + given)


FRONT = """
import asyncio, pathlib, sys
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling
from tests.support.engines import DirectEngine
async def main():
    engine = await DirectEngine.start("tiny", pathlib.Path(sys.argv[1]), LoadOptions())
    engine.generate([Generate(0, [1, 2, 3], Sampling(), 100_000)])
    print(engine.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_an_engine_that_cannot_read_a_message_ends_and_can_be_replaced(
    tiny_model: Path,
) -> None:
    async with started(tiny_model) as client:
        with client.generate([request(range(20), 400)]) as stream:
            client._child.writer.write(HEADER.pack(3) + b"???")
            with pytest.raises(EngineFailed, match="event=frame_unreadable"):
                async for _ in stream.rows():
                    pass


def test_an_engine_ends_by_itself_when_its_front_is_killed(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "long", context=200_000)
    with subprocess.Popen(
        [sys.executable, "-c", FRONT, str(path)], stdout=subprocess.PIPE, text=True
    ) as front:
        engine = psutil.Process(int(front.stdout.readline()))
        front.kill()
        engine.wait(timeout=2)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 5_000), "safetensors"),
        (lambda f: (f / "config.json").write_text('{"model_type": "no_such"}'), "no_such"),
        (lambda f: (f / "config.json").write_text("{"), "config"),
    ],
)
async def test_a_folder_that_cannot_be_loaded_says_why(
    tmp_path: Path, damage: object, says: str
) -> None:
    path = build_tiny_model(tmp_path / "model")
    damage(path)
    children = set(psutil.Process().children(recursive=True))
    with pytest.raises(ModelLoadFailed, match=f"(?i){says}"):
        await DirectEngine.start("tiny", path, LoadOptions())
    assert set(psutil.Process().children(recursive=True)) <= children


async def test_what_lies_in_the_folder_that_a_server_is_started_in_is_no_module_of_its_engines(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path)
    async with started(tiny_model):
        assert (await find_device()).name


async def test_an_engine_tells_where_its_threads_are(tiny_model: Path) -> None:
    process = await EngineClient.start("tiny", tiny_model, LoadOptions())
    try:
        await process.tell_stacks()
        assert any("in main" in line for line in process.last_lines), process.last_lines
        assert process.process.returncode is None
    finally:
        await process.stop()
