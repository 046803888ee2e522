"""A real server for tests: the command line's own process, its engines, and how to ask it things.

Whatever a test does to it, nothing of it is left behind, and a test that leaves something fails.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from mlx_server.engine.idle import RELEASE_SECONDS

READY_SECONDS = 90.0
STOP_SECONDS = 15.0
STRAGGLER_SECONDS = 2.0
POLL_SECONDS = 0.02
GREETING = re.compile(r"answers at (http://\S+)")
MARK = "TEST_SERVER"

PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}
"""Options of clients that meet no TLS: certificates would take 20 ms to read for each client."""

HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Server:
    """A server process and how to reach it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    mark: str
    """The value of `MARK` in the environment of all its processes."""

    def client(self, **options: Any) -> httpx.AsyncClient:
        """A client of its own connection pool."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            **{"base_url": self.url, "timeout": 60, **PLAIN, "limits": limits} | options
        )

    def children(self) -> list[psutil.Process]:
        """The server's living processes besides the front, wherever they were moved to."""
        return [p for p in _family(self.mark) if p.pid != self.process.pid]

    def engines(self) -> list[psutil.Process]:
        """Those of its children that are engines."""
        return [p for p in self.children() if "mlx_server.engine.worker" in p.cmdline()]

    async def models(self) -> dict[str, dict[str, Any]]:
        """What `GET /admin/models` says, by model id."""
        async with self.client() as client:
            answer = await client.get("/admin/models")
            assert answer.status_code == 200
            return {model["id"]: model for model in answer.json()["models"]}

    async def works(self, model: str) -> None:
        """Wait until the model has a request, which must be a long one for this to see it."""

        async def asked() -> bool:
            return bool((await self.models())[model]["in_flight"])

        await until(asked, 30.0)

    async def idle(self, model: str, seconds: float = 1.0) -> dict[str, Any]:
        """Wait until nothing of `model` runs or waits; returns its state then."""
        state: dict[str, Any] = {}

        async def quiet() -> bool:
            nonlocal state
            state = (await self.models())[model]
            return state["running"] == state["waiting"] == state["in_flight"] == 0

        await until(quiet, seconds, lambda: f"{model} is busy: {state}")
        return state

    async def rested(self, model: str) -> dict[str, Any]:
        """Wait until `model` has been idle for long enough to give its freed buffers back, and a
        CPU's heap, which no figure tells.
        """

        async def has_given() -> bool:
            state = await self.idle(model)
            idle = time.time() - state["last_used"]
            return bool(state["memory"]["cache"] == 0 and idle > RELEASE_SECONDS + 1)

        await until(has_given, 30.0, every=0.25)
        return await self.idle(model)


def logged(log: str, name: str) -> list[dict[str, Any]]:
    """The server's own events of that name in what it wrote."""
    lines = (line for line in log.splitlines() if line[:1] + line[-1:] == "{}")
    return [told for told in map(json.loads, lines) if told["event"] == name]


@contextlib.contextmanager
def serving(
    home: Path,
    *flags: str,
    ready: bool = True,
    steps_may_fail: bool = False,
    may_hang: bool = False,
    before: Sequence[str] = (),
    **settings: object,
) -> Iterator[Server]:
    """Run `mlx-server serve` with `flags`, and with `settings` as environment variables; `before`
    is what runs it.

    Waits for it to be ready, or just for it to answer. Ends all of its processes, and fails if
    SIGTERM had not done so already, or if an engine's step failed or hung: recovery hides that.
    """
    home.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    log = home / f"server-{mark}.log"
    own = {MARK: mark, "MLX_SERVER_HOME": str(home), "HF_HOME": str(home / "hub")}
    own |= {f"MLX_SERVER_{name.upper()}": _as_variable(value) for name, value in settings.items()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "mlx_server", "serve", "--port", "0", *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            start_new_session=True,
        )
    try:
        server = Server(_greeted_url(process, log), process, log, mark)
        _wait_for(server, "/ready" if ready else "/health")
        yield server
    except BaseException:
        print(f"the server's log ends:\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        left = _end(process, mark)
    assert not left, f"left behind: {left}"
    said = log.read_text(errors="replace")
    assert steps_may_fail or "event=step_failed" not in said, said[-4000:]
    assert may_hang or not logged(said, "engine_hung"), said[-8000:]


def _as_variable(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _greeted_url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the server says it listens on."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := GREETING.search(log.read_text(errors="replace")):
            return found[1]
        time.sleep(POLL_SECONDS)
    raise AssertionError("the server never said where it listens")


def _wait_for(server: Server, path: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with httpx.Client(base_url=server.url, **PLAIN) as client:
        while time.monotonic() < deadline and server.process.poll() is None:
            try:
                if client.get(path).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(POLL_SECONDS)
    raise AssertionError(f"the server never answered {path}")


def _family(mark: str) -> list[psutil.Process]:
    """The living processes that were started with that mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # somebody else's, or it ended meanwhile
    return found


def _end(process: subprocess.Popen[bytes], mark: str) -> list[psutil.Process]:
    """Ask the server to stop, then kill what remains; returns what had to be killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    deadline = time.monotonic() + STRAGGLER_SECONDS
    while (left := _family(mark)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    return left


# waiting


async def until(
    check: Callable[[], Awaitable[object]],
    seconds: float,
    complaint: Callable[[], str] = lambda: "waited in vain",
    every: float = POLL_SECONDS,
) -> float:
    """Poll `check` until it is true; returns how many seconds that took."""
    started = time.monotonic()
    while not await check():
        assert time.monotonic() - started < seconds, complaint()
        await asyncio.sleep(every)
    return time.monotonic() - started


# answers


def settled(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without what depends on how fast passes were: how many tokens were guessed."""
    if usage is not None and (details := usage.get("completion_tokens_details")):
        for name in ("accepted_prediction_tokens", "rejected_prediction_tokens"):
            assert details.pop(name) >= 0
    return usage


@dataclass
class Answer:
    """An answer, streamed or whole, folded: each choice's text, reason and log-probabilities."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    """Whether a stream ended with its end mark."""

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def reason(self) -> str | None:
        return self.reasons[0]

    def take(self, body: dict[str, Any]) -> None:
        """Add a chunk of a stream, or a whole answer."""
        self.error = body.get("error", self.error)
        self.usage = settled(body.get("usage")) or self.usage
        for choice in body.get("choices", []):
            index = choice["index"]
            said = choice.get("delta") or choice.get("message") or choice
            piece = said.get("content") or said.get("text") or ""
            self.texts[index] = self.texts.get(index, "") + piece
            self.pieces.append(piece)
            self.reasons[index] = choice["finish_reason"] or self.reasons.get(index)
            if choice.get("logprobs"):
                self.logprobs.setdefault(index, []).append(choice["logprobs"])


async def ask_through(
    harm: Callable[[], Awaitable[None]], client: httpx.AsyncClient, bodies: list[dict[str, Any]]
) -> list[Answer]:
    """The answers to chats that are streamed; `harm` is done as soon as all have begun."""
    begun = [asyncio.Event() for _ in bodies]
    async with asyncio.TaskGroup() as group:
        asking = [
            group.create_task(read_stream(client, CHAT, body, event.set))
            for body, event in zip(bodies, begun, strict=True)
        ]
        for event in begun:
            await event.wait()
        await harm()
    return [task.result() for task in asking]


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    """The answer to `body`, which must succeed: read as a stream if it asks for one."""
    if body.get("stream"):
        return await read_stream(client, path, body)
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    folded = Answer(done=True)
    folded.take(answer.json())
    return folded


async def read_stream(
    client: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    begun: Callable[[], None] = lambda: None,
) -> Answer:
    """Read a stream to its end, whether it ends well or with an error. `begun` is called whenever
    there is more of it.
    """
    folded = Answer()
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for data in stream_data(response):
            assert not folded.done, "something follows the end mark"
            if data == "[DONE]":
                folded.done = True
            else:
                folded.take(json.loads(data))
            begun()
    return folded


async def stream_data(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event of a stream; comments are passed over."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
        else:
            assert not line or line.startswith(":"), line


def chat(model: str, **more: Any) -> dict[str, Any]:
    """The body of a chat request that greets."""
    return {"model": model, "messages": HELLO, "temperature": 0} | more


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
