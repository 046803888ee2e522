"""Processes that end, clients that vanish, models that load: nothing leaks and nobody is stuck."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server import (
    CHAT,
    TEXT,
    Answer,
    Server,
    ask,
    chat,
    read_stream,
    serving,
    until,
)
from tests.support.tiny import build_tiny_model

CONTEXT = 16_384
PROMPT_SECONDS = 3
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LOOPING = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
ENDLESS = {"max_tokens": CONTEXT - 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("lifecycle")
    # Nothing is to be kept, so that memory tells what leaks.
    build_tiny_model(home / "models" / "looping", template=LOOPING)
    settings = {"prefix_cache": "0", "prompt_timeout": PROMPT_SECONDS}
    with serving(home, "--model", str(model), **settings) as server:
        yield server


@asynccontextmanager
async def streams(server: Server, count: int) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """Streams that all run, and that do not end by themselves for a long while."""
    async with server.client() as client:
        bodies = [chat("tiny", stream=True, **ENDLESS) for _ in range(count)]
        tasks = [asyncio.create_task(read_stream(client, CHAT, body)) for body in bodies]
        try:
            await in_flight(server, count)
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def in_flight(server: Server, count: int) -> None:
    """Wait until the engine holds that many requests."""

    async def held() -> bool:
        return bool((await server.models())["tiny"]["in_flight"] == count)

    await until(held, 10, lambda: f"never {count} requests in flight")


async def gone(processes: list[psutil.Process], seconds: float) -> float:
    """Wait until none of `processes` lives; returns how long that took."""

    async def dead() -> bool:
        return not any(_lives(process) for process in processes)

    return await until(dead, seconds, lambda: f"still there: {processes}")


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ends


async def test_a_killed_front_leaves_no_process(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, "--model", str(model)) as server:
        assert len(server.engines()) == 1
        async with streams(server, 2) as open_streams:
            children = server.children()
            server.process.kill()
            print(f"children ended after {await gone(children, 2.0):.2f} s")
            cut = await asyncio.gather(*open_streams, return_exceptions=True)
        assert all(isinstance(end, httpx.TransportError) for end in cut)


async def test_sigterm_while_loading_ends_the_server_at_once(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, "--model", str(model), ready=False) as server:
        server.process.terminate()
        await gone([psutil.Process(server.process.pid)], 3.0)
        assert server.process.wait() == 0


@asynccontextmanager
async def watched(server: Server, path: str) -> AsyncIterator[list[int]]:
    """The statuses that `path` answers with while the block runs, repeats left out."""
    seen: list[int] = []

    async def watch() -> None:
        async with server.client() as client:
            while True:
                status = (await client.get(path)).status_code
                if seen[-1:] != [status]:
                    seen.append(status)
                await asyncio.sleep(0.03)

    watcher = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])


async def test_a_dead_engine_is_replaced_and_nobody_notices(server: Server) -> None:
    before = (await server.models())["tiny"]
    async with (
        watched(server, "/health") as health,
        watched(server, "/ready") as ready,
        server.client() as client,
    ):
        wanted = {"max_tokens": 300, "ignore_eos": True}
        bodies = [(CHAT, chat("tiny", stream=stream, **wanted)) for stream in (True, True, False)]
        bodies.append((TEXT, {"model": "tiny", "prompt": "a"} | wanted))
        asked = [asyncio.create_task(ask(client, path, body)) for path, body in bodies]
        await in_flight(server, len(asked))
        psutil.Process(before["pid"]).kill()
        killed = time.monotonic()
        for answer in await asyncio.gather(*asked):
            assert (answer.error, answer.done, answer.reasons) == (None, True, {0: "length"})
        print(f"everybody was answered after {time.monotonic() - killed:.2f} s")
    assert (ready, health) == ([200], [200])
    after = await server.idle("tiny")
    assert after["restarts"] == before["restarts"] + 1
    assert [engine.pid for engine in server.engines()] == [after["pid"]]
    assert after["pid"] != before["pid"]


async def test_a_dead_engine_that_nobody_uses_is_replaced_for_a_model_named_at_the_start(
    server: Server,
) -> None:
    async with watched(server, "/ready") as ready:
        [engine] = server.engines()
        engine.kill()

        async def unready_and_ready_again() -> bool:
            return ready[-2:] == [503, 200]

        await until(unready_and_ready_again, 10, lambda: f"/ready answered {ready}")
    assert [engine.pid for engine in server.engines()] == [(await server.idle("tiny"))["pid"]]


# clients that vanish


@dataclass
class Load:
    """Mixed requests against one model, a quarter of them dropped by the client."""

    server: Server
    random: random.Random
    answered: int = 0
    dropped: int = 0

    async def run(self, count: int, concurrency: int = 8) -> None:
        left = iter(range(count))
        async with self.server.client() as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._worker(client, left))

    async def _worker(self, client: httpx.AsyncClient, left: Iterator[int]) -> None:
        for number in left:
            path, body = self._request()
            if number % 4:
                await ask(client, path, body)
                self.answered += 1
            else:
                await self._drop(client, path, body | {"ignore_eos": True, "max_tokens": 400})
                self.dropped += 1

    def _request(self) -> tuple[str, dict[str, Any]]:
        choose = self.random
        body: dict[str, Any] = {
            "model": "tiny",
            "stream": choose.random() < 0.5,
            "n": choose.choice([1, 1, 1, 2, 3]),
            "max_tokens": choose.randint(1, 40),
            "temperature": choose.choice([0, 0.7, 1.2]),
            "top_p": choose.choice([1, 0.9]),
            "seed": choose.randrange(1000),
            "stop": choose.choice([None, "e", ["th", "xyz"]]),
            "repetition_penalty": choose.choice([1, 1.1]),
        }
        words = " ".join(["word"] * choose.choice([1, 5, 30, 200]))
        if choose.random() < 0.5:
            return TEXT, body | {"prompt": words, "logprobs": choose.choice([None, 0, 2])}
        top = choose.choice([{}, {"logprobs": True, "top_logprobs": 2}])
        return CHAT, body | {"messages": [{"role": "user", "content": words}]} | top

    async def _drop(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        match self.random.randrange(3):
            case 0:
                await self._hang_up(path, body)
            case 1:
                await self._leave_stream(client, path, body | {"stream": True})
            case _:
                await self._give_up(client, path, body)

    async def _hang_up(self, path: str, body: dict[str, Any]) -> None:
        """Send a request and close the connection without reading a byte."""
        url = httpx.URL(self.server.url)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(data)}\r\n\r\n"
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head.encode() + data)
        await writer.drain()
        await asyncio.sleep(self.random.choice([0, 0, 0.005]))
        writer.close()
        await writer.wait_closed()

    async def _leave_stream(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any]
    ) -> None:
        """Read some of a stream."""
        enough = self.random.randint(1, 20)
        async with client.stream("POST", path, json=body) as response:
            async for _ in response.aiter_lines():
                enough -= 1
                if not enough:
                    return

    async def _give_up(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        """Wait for an answer, streamed or not, and lose patience."""
        try:
            async with asyncio.timeout(self.random.uniform(0.001, 0.2)):
                await client.post(path, json=body)
        except TimeoutError:
            return


@dataclass(frozen=True)
class Footprint:
    """Bytes: what the engine's arrays take, and each process's resident memory."""

    active: int
    front: int
    engine: int

    @classmethod
    async def of(cls, server: Server) -> "Footprint":
        state = await server.rested("tiny")
        [engine] = server.engines()
        front = psutil.Process(server.process.pid)
        return cls(state["memory"]["active"], front.memory_info().rss, engine.memory_info().rss)


GROWTH = 1.03
"""What resident memory may grow by."""
SHAPES = 8192
"""Bytes of arrays that stay: some constants for each shape that a compiled function has met."""


async def test_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    load = Load(server, random.Random(2))
    await load.run(24)
    warm = await Footprint.of(server)
    await load.run(48)
    await _assert_unchanged(server, warm)
    assert (load.answered, load.dropped) == (54, 18)
    assert not (server.log.parent / "cache").exists(), "nothing is to be kept"


@pytest.mark.soak
async def test_thousands_of_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    load = Load(server, random.Random(3))
    await load.run(200)
    warm = await Footprint.of(server)
    for _ in range(9):
        await load.run(200)
        await _assert_unchanged(server, warm)


async def _assert_unchanged(server: Server, before: Footprint) -> None:
    after = await Footprint.of(server)
    front, engine = after.front / before.front, after.engine / before.engine
    print(f"active {before.active} → {after.active}, front {front:.4f}, engine {engine:.4f}")
    assert after.active == pytest.approx(before.active, rel=0.01, abs=SHAPES)
    assert front <= GROWTH
    assert engine <= GROWTH


# the text process


async def test_a_dead_text_process_is_replaced(server: Server) -> None:
    [text] = [p for p in server.children() if p not in server.engines()]
    async with server.client() as client, streams(server, 2) as running:
        text.kill()
        await gone([text], 2)
        answer = await ask(client, CHAT, chat("tiny", max_tokens=3, ignore_eos=True))
        assert answer.reasons == {0: "length"}
        assert not any(task.done() for task in running)


async def test_a_template_that_runs_on_and_on_ends_its_own_request_only(
    server: Server,
) -> None:
    async with server.client() as client:
        body = {"model": "looping", "messages": [{"role": "user", "content": "loop"}]}
        answer = await client.post(CHAT, json=body)
        assert answer.status_code == 400
        assert f"{PROMPT_SECONDS} seconds" in answer.json()["error"]["message"]
        body["messages"][0]["content"] = "Hello"
        assert (await client.post(CHAT, json=body | {"max_tokens": 3})).status_code == 200
        assert (await client.post("/admin/models/looping/unload")).status_code == 200
