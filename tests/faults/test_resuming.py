"""Engines that die, hang or are killed by a request: whoever is not to blame gets the same text."""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import LoadOptions, Row, Sampling
from mlx_server.models.pool import stream as row_stream
from mlx_server.models.pool.resumable import ResumableEngine
from tests.engine.conftest import request
from tests.faults.conftest import (
    CONTEXT,
    LIVELY,
    TINY,
    TimedAnswer,
    engine_of,
    loading_engine,
    reaches,
    read_timed,
    running,
    state_of,
)
from tests.support.server import CHAT, TEXT, Answer, Server, ask, chat, read_stream, serving, until
from tests.support.ties import same
from tests.support.tiny import build_scripted_model, build_tiny_model

Asked = tuple[str, dict[str, Any]]


def mixed(model: str, tokens: int) -> list[Asked]:
    """Eight streams: four greedy ones, and four that sample in ways that look back.

    All tell log-probabilities, to judge a difference by.
    """
    more: dict[str, Any] = {
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    greedy: list[Asked] = [
        (CHAT, chat(model, messages=[{"role": "user", "content": "Tell me " * (i + 1)}]))
        for i in range(4)
    ]
    hot = chat(model, temperature=1, seed=5)
    sampled = [
        (CHAT, hot | {"repetition_penalty": 1.2, "frequency_penalty": 0.4}),
        (CHAT, hot | {"presence_penalty": 0.5, "top_p": 0.9, "seed": 6}),
        (CHAT, hot | {"stop": ["no such text", "nor this"], "top_k": 40, "seed": 7}),
    ]
    looking: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    chats = [(path, body | looking) for path, body in [*greedy, *sampled]]
    text = {"model": model, "prompt": "Once", "temperature": 0.8, "seed": 8, "logprobs": 2}
    return [(path, body | more) for path, body in [*chats, (TEXT, text)]]


# killed


@dataclass
class Killing:
    """Streams that are asked for again and again while their engine is killed again and again."""

    server: Server
    model: str
    asked: list[Asked]
    random: random.Random
    apart: int = 800
    """Up to how many events lie between kills."""
    expected: list[Answer] = field(default_factory=list)
    now: list[TimedAnswer] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    answers: int = 0
    ties: int = 0
    done: bool = False

    async def run(self, kills: int) -> None:
        async with self.server.client(timeout=120) as client:
            undisturbed = (read_timed(client, *one) for one in self.asked)
            self.expected = list(await asyncio.gather(*undisturbed))
            self.now = [TimedAnswer() for _ in self.asked]
            async with asyncio.TaskGroup() as group:
                for index in range(len(self.asked)):
                    group.create_task(self._repeat(client, index))
                await self._kill(kills)
                self.done = True

    async def _repeat(self, client: httpx.AsyncClient, index: int) -> None:
        while not self.done:
            self.now[index] = TimedAnswer()
            answer = await read_timed(client, *self.asked[index], self.now[index])
            self.answers += 1
            self.ties += same(answer, self.expected[index])
            self.pauses += answer.pauses(self.kills)

    async def _kill(self, kills: int) -> None:
        pid = None
        for _ in range(kills):
            pid = await engine_of(self.server, self.model, pid)
            await self._some_events()
            os.kill(pid, signal.SIGKILL)
            self.kills.append(time.monotonic())

    async def _some_events(self) -> None:
        """Let any number of events come, none at times: then the engine has only just begun."""
        wait_for_some = self.random.random() > 1 / 8
        enough = self._events() + wait_for_some * self.random.randint(1, self.apart)

        async def came() -> bool:
            return self._events() >= enough

        await until(came, LIVELY)

    def _events(self) -> int:
        return sum(len(answer.moments) for answer in self.now) + 10**6 * self.answers


async def _kill_at_random(
    server: Server, model: str, tokens: int, kills: int, **more: int
) -> Killing:
    front = server.process.pid
    before = await _starts(server, model)
    killing = Killing(server, model, mixed(model, tokens), random.Random(7), **more)
    await killing.run(kills)
    await server.idle(model, LIVELY)
    assert await _starts(server, model) - before == kills
    assert psutil.Process(front).is_running()
    assert len(server.engines()) == 1
    pauses = sorted(killing.pauses)
    print(
        f"{kills} kills, {killing.answers} answers, {killing.ties} near-ties; pauses of "
        f"{len(pauses)} streams: median {statistics.median(pauses):.2f} s, worst {pauses[-1]:.2f} s"
    )
    return killing


async def _starts(server: Server, model: str) -> int:
    """How many engines the model has had; one that ends while nobody uses it is loaded anew."""
    state = await state_of(server, model)
    return int(state["restarts"] + state["loads"])


async def test_three_kills_at_random_moments_change_nothing_in_any_stream(mortal: Server) -> None:
    killing = await _kill_at_random(mortal, TINY, tokens=150, kills=3, apart=400)
    assert killing.ties <= 1


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_two_hundred_kills_at_random_moments_change_nothing_in_any_stream(
    mortal: Server,
) -> None:
    killing = await _kill_at_random(mortal, TINY, tokens=1000, kills=200)
    assert killing.ties <= killing.answers // 4


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_fifty_kills_amid_guesses_change_nothing_in_any_stream(tmp_path: Path) -> None:
    """The model says the same again and again, so that nearly all of it is guessed."""
    script = "".join(map(chr, range(ord("0"), ord("z"))))
    model = build_scripted_model(tmp_path / "reciting", script, context=CONTEXT)
    with serving(tmp_path / "home", "--model", str(model), prefix_cache="0") as server:
        await _kill_at_random(server, "reciting", tokens=3000, kills=50, apart=200)
        async with server.client() as client:
            told = (await client.get("/metrics")).text
        found = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\S* (\d+)", told, re.M)
        assert found is not None
        assert int(found[1]) > 500


async def test_usage_tells_of_the_cache_as_the_first_engine_did(tmp_path: Path, tiny: Path) -> None:
    with serving(tmp_path, "--model", str(tiny), disk_cache="off") as server:
        async with server.client() as client:
            usage = {"stream_options": {"include_usage": True}}
            body = chat(TINY, max_tokens=100, logprobs=True, top_logprobs=2, **usage)
            body["messages"] = [{"role": "user", "content": "one two three " * 40}]
            first = await read_timed(client, CHAT, body)
            second = await read_timed(client, CHAT, body)
            async with running(client, (CHAT, body)) as [task]:
                os.kill(await engine_of(server), signal.SIGKILL)
                killed = await task
            metrics = (await client.get("/metrics")).text
        assert first.usage != second.usage, "the second found the first one's prompt in the cache"
        same(killed, second)
        assert (await state_of(server))["restarts"] == 1
        assert f'mlx_server_engine_restarts_total{{engine="0",model_name="{TINY}"}} 1.0' in metrics


async def test_whole_answers_choices_and_requests_that_wait_survive(tmp_path: Path) -> None:
    said = "One two three four five six seven eight nine ten eleven twelve thirteen."
    path = build_scripted_model(tmp_path / "scripted", said, context=CONTEXT)
    seen = (CHAT, chat(path.name, max_tokens=1200, ignore_eos=True, stream=True))
    asked: list[Asked] = [
        (CHAT, chat(path.name, max_tokens=600, ignore_eos=True, n=3)),
        (TEXT, {"model": path.name, "prompt": ["a", "b"], "max_tokens": 250, "echo": True}),
        *((CHAT, chat(path.name, temperature=1, max_tokens=600 - i)) for i in range(6)),
    ]
    flags = ("--model", str(path))
    # With guesses, which would all come true, answers would be over before anything happens.
    slow: dict[str, Any] = {"max_batch": 2, "prefix_cache": "0", "speculation": "off"}
    with serving(tmp_path / "home", *flags, **slow) as server:
        async with server.client() as client:
            expected = await asyncio.gather(*(ask(client, *one) for one in [seen, *asked]))
            pieces = 0

            def count() -> None:
                nonlocal pieces
                pieces += 1

            async def goes_on(after: int) -> None:
                async def more() -> bool:
                    return pieces > after

                await until(more, LIVELY)

            # Two run at a time, this one among them, and all that come after it wait.
            tasks = [asyncio.create_task(read_stream(client, *seen, count))]
            await goes_on(0)
            tasks += [asyncio.create_task(ask(client, *one)) for one in asked]
            pid = None
            for _ in range(2):
                pid = await engine_of(server, path.name, other_than=pid)
                await goes_on(pieces)
                os.kill(pid, signal.SIGKILL)
            answers = await asyncio.gather(*tasks)
        assert [(one.texts, one.reasons, one.usage) for one in answers] == [
            (one.texts, one.reasons, one.usage) for one in expected
        ]


async def test_a_request_that_comes_while_the_engine_restarts_is_answered(mortal: Server) -> None:
    async with mortal.client() as client:
        body = chat(TINY, max_tokens=10, ignore_eos=True, logit_bias={"7": 1})
        expected = await ask(client, CHAT, body)
        async with running(client, (CHAT, chat(TINY, max_tokens=300, ignore_eos=True))) as [held]:
            os.kill(await engine_of(mortal), signal.SIGKILL)
            await reaches(mortal, "restarting")
            late = await ask(client, CHAT, body)
            assert (await held).done
        assert (late.text, late.usage) == (expected.text, expected.usage)


async def test_an_engine_killed_while_it_loads_in_place_of_another_is_replaced_too(
    mortal: Server,
) -> None:
    async with mortal.client() as client:
        async with running(client, (CHAT, chat(TINY, max_tokens=300, ignore_eos=True))) as [held]:
            pid = await engine_of(mortal)
            os.kill(pid, signal.SIGKILL)
            (await loading_engine(mortal, other_than=pid)).kill()
            answer = await held
        assert (answer.error, answer.done) == (None, True)


async def test_a_model_unloaded_while_its_engine_restarts_finishes_its_requests(
    mortal: Server,
) -> None:
    async with mortal.client() as client:
        async with running(client, (CHAT, chat(TINY, max_tokens=300, ignore_eos=True))) as [held]:
            os.kill(await engine_of(mortal), signal.SIGKILL)
            await reaches(mortal, "restarting")
            unloaded = await client.post(f"/admin/models/{TINY}/unload")
            assert held.done()
        assert unloaded.json()["state"] == "absent"
        assert held.result().done
        assert not mortal.engines()
        await ask(client, CHAT, chat(TINY, max_tokens=1))


async def test_a_server_stopped_while_an_engine_restarts_leaves_nothing(
    tmp_path: Path, tiny: Path
) -> None:
    with serving(tmp_path, "--model", str(tiny), grace_period=0) as server:
        held = (CHAT, chat(TINY, max_tokens=9000, ignore_eos=True))
        async with server.client() as client, running(client, held):
            pid = await engine_of(server)
            os.kill(pid, signal.SIGKILL)
            await loading_engine(server, other_than=pid)
            server.process.terminate()
            assert await asyncio.to_thread(server.process.wait, LIVELY) == 0


# hung


async def test_an_engine_that_hangs_is_replaced_and_its_streams_go_on(
    tmp_path: Path, tiny: Path
) -> None:
    with serving(
        tmp_path, "--model", str(tiny), hang_timeout=1, prefix_cache="0", may_hang=True
    ) as server:
        asked = mixed(TINY, 100)[::2]
        async with server.client() as client:
            expected = await asyncio.gather(*(read_timed(client, *one) for one in asked))
            async with running(client, *asked) as tasks:
                hung = psutil.Process(await engine_of(server))
                hung.suspend()
                suspended = time.monotonic()
                answers = await asyncio.gather(*tasks)
                pauses = [pause for one in answers for pause in one.pauses([suspended])]
        print(f"streams paused for up to {max(pauses):.2f} s")
        assert sum(map(same, answers, expected)) <= 1
        assert not hung.is_running()
        assert '"event": "engine_hung"' in server.log.read_text()


# poisoned

POISON = """
import os
import sys
from pathlib import Path

from mlx_lm.models import llama

ModelArgs = llama.ModelArgs
DEADLY = {deadly}

if (Path(__file__).parent / "deadly-to-load").exists():
    print("no way to load this", file=sys.stderr, flush=True)
    os.abort()


class Model(llama.Model):
    def __call__(self, inputs, cache=None, **more):
        if cache and not hasattr(type(cache[0]), "state"):
            raise TypeError("a prompt is computed by itself here, so that it can be looked at")
        # A decode step is built before its tokens are known.
        if inputs.shape[1] > 1 and (inputs == DEADLY).any().item():
            os.abort()
        return super().__call__(inputs, cache=cache, **more)
"""
DEADLY = 77


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own code ends its process at a certain token, or at once if a file is there."""
    folder = tmp_path_factory.mktemp("faults") / "fragile"
    build_tiny_model(folder, context=CONTEXT, layers=2, hidden=256)
    (folder / "fragile.py").write_text(POISON.format(deadly=DEADLY))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "fragile.py"}))
    return folder


@pytest.fixture(scope="module")
def fragile_server(tmp_path_factory: pytest.TempPathFactory, fragile: Path) -> Iterator[Server]:
    home, trusted = tmp_path_factory.mktemp("home"), [str(fragile), fragile.name]
    flags = ("--model", str(fragile))
    with serving(home, *flags, trust_remote_code=trusted, prefix_cache="0") as server:
        yield server


async def test_a_poisonous_request_fails_alone_after_three_deaths(fragile_server: Server) -> None:
    never = {"logit_bias": {DEADLY: -100}}  # sent again, what was said is part of the prompt
    asked = [(path, body | never) for path, body in mixed("fragile", 100)]
    poison = {"model": "fragile", "prompt": [5, DEADLY, 6, 7], "max_tokens": 5}
    async with fragile_server.client() as client:
        expected = await asyncio.gather(*(read_timed(client, *one) for one in asked))
        async with running(client, *asked) as tasks:
            failed = await client.post(TEXT, json=poison)
            answers = await asyncio.gather(*tasks)
            streamed = await read_timed(client, TEXT, poison)
    assert failed.status_code == 500
    error = failed.json()["error"]
    assert error["code"] == "engine_failed"
    assert failed.headers["x-request-id"] in error["message"]
    assert streamed.error is not None
    assert streamed.error["code"] == "engine_failed"
    assert sum(map(same, answers, expected)) <= 1
    assert fragile_server.log.read_text().count('"event": "engine_ended"') <= 6
    assert fragile_server.log.read_text().count('"event": "request_blamed"') == 2


async def test_a_model_whose_engine_cannot_be_loaded_again_fails_and_says_why(
    fragile: Path, fragile_server: Server
) -> None:
    deadly = fragile / "deadly-to-load"
    async with fragile_server.client() as client:
        async with running(client, (CHAT, chat("fragile", max_tokens=9000))) as [held]:
            deadly.touch()
            os.kill(await engine_of(fragile_server, "fragile"), signal.SIGKILL)
            answer = await held
        assert answer.error is not None
        assert answer.error["code"] == "model_load_failed"
        assert fragile_server.log.read_text().count('"event": "engine_load_crashed"') == 3
        await _failed_for_good(fragile_server)
        refused = await client.post(CHAT, json=chat("fragile", max_tokens=1))
        assert refused.status_code == 503
        assert "signal 6" in refused.json()["error"]["message"]
        await _failed_for_good(fragile_server)
        deadly.unlink()
        assert (await ask(client, CHAT, chat("fragile", max_tokens=1))).done


async def _failed_for_good(server: Server) -> None:
    state = await state_of(server, "fragile")
    assert (state["state"], state["pid"]) == ("failed", None)
    assert "signal 6" in state["reason"]
    assert "no way to load this" in state["last_lines"]
    assert not server.engines()


# limits of patience


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    """A server with two places, for which nobody waits long and which nobody keeps for long."""
    home, flags = tmp_path_factory.mktemp("home"), ("--model", str(tiny))
    with serving(home, *flags, max_batch=2, queue_timeout=0.5, request_timeout=3) as server:
        yield server


async def test_a_request_that_finds_no_place_in_time_is_told_to_come_back(
    impatient: Server,
) -> None:
    async with impatient.client() as client:
        long = (CHAT, chat(TINY, max_tokens=9000, ignore_eos=True))
        async with running(client, long, long) as held:
            refused, streamed = await asyncio.gather(
                client.post(CHAT, json=chat(TINY, max_tokens=1)),
                read_timed(client, CHAT, chat(TINY, max_tokens=1)),
            )
            assert not any(one.done() for one in held)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_timeout"
        assert int(refused.headers["retry-after"]) >= 1
        assert streamed.error is not None
        assert streamed.error["code"] == "queue_timeout"
    await impatient.idle(TINY)


async def test_a_request_that_takes_too_long_is_ended_and_its_work_too(impatient: Server) -> None:
    async with impatient.client() as client:
        body = chat(TINY, max_tokens=9000, ignore_eos=True)
        whole, streamed = await asyncio.gather(
            client.post(CHAT, json=body), read_timed(client, CHAT, body)
        )
        assert whole.status_code == 504
        assert whole.json()["error"]["code"] == "request_timeout"
        assert any(streamed.pieces)
        assert streamed.error is not None
        assert streamed.error["code"] == "request_timeout"
    await impatient.idle(TINY)


async def test_a_stream_that_nobody_reads_pauses_and_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "quick")
    asked = request([5, 6, 7], 300, Sampling(seed=3, presence_penalty=0.5), logprobs=3)

    process = await EngineClient.start("quick", path, LoadOptions())
    engine = ResumableEngine("quick")
    engine.replicas[0].attach(process)
    try:
        with engine.generate([asked] * 2, "undisturbed") as stream:
            expected = [pair async for pair in stream.rows()]
        monkeypatch.setattr(row_stream, "MAX_UNREAD", 80)
        with engine.generate([asked] * 2, "slow") as stream:
            got = []
            async for pair in stream.rows():
                got.append(pair)
                if len(got) % 120 == 1:
                    await until(lambda: _is_paused(process), LIVELY)
        for index in range(2):
            assert _of_choice(got, index) == _of_choice(expected, index)
            assert len(_of_choice(got, index)) == 300
        await until(lambda: _was_sent_completions(process), LIVELY)
    finally:
        await process.stop()


def _of_choice(rows: list[tuple[int, Row]], index: int) -> list[int]:
    return [token for i, row in rows if i == index for token in row.tokens]


async def _is_paused(process: EngineClient) -> bool:
    return process.in_flight == 0


async def _was_sent_completions(process: EngineClient) -> bool:
    """Whether the prompts that the engine was sent held completions, and not just 3 tokens."""
    return process.stats is not None and process.stats.prefix.prompt_tokens > 100
