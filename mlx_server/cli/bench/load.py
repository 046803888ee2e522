"""Loads a server with streams of chat completions, and times what comes back."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_server.cli.bench.figures import Level, ServerState, Timing, measure
from mlx_server.cli.remote import Remote, event_of

if TYPE_CHECKING:
    import httpx2

WORDS = ("time", "year", "way", "day", "thing", "world", "school", "state", "family", "night")
SAMPLE_SECONDS = 0.25
SILENCE = 600.0


@dataclass(frozen=True)
class Load:
    """`prompt_tokens` is a wish, since words are counted: the table shows what it came to."""

    model: str
    prompt_tokens: int
    max_tokens: int
    requests: int
    """Per stream and level."""


async def run_level(remote: Remote, load: Load, concurrency: int) -> Level:
    """`concurrency` streams at once, each of which asks again when it is answered."""
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(SILENCE, connect=10.0)
    async with httpx2.AsyncClient(
        base_url=remote.url,
        headers=remote.headers,
        timeout=timeout,
        limits=limits,
        trust_env=False,
    ) as client:
        async with _observed(client, load.model) as observed:
            begun, cpu = time.perf_counter(), time.process_time()
            async with asyncio.TaskGroup() as group:
                streams = [
                    group.create_task(_stream(client, load, concurrency, number))
                    for number in range(concurrency)
                ]
            seconds = time.perf_counter() - begun
            share = (time.process_time() - cpu) / seconds
        timings = [timing for stream in streams for timing in stream.result()]
        return measure(concurrency, timings, seconds, share, observed.state)


async def _stream(
    client: "httpx2.AsyncClient", load: Load, level: int, number: int
) -> list[Timing]:
    timings = []
    for turn in range(load.requests):
        body = _body(load, random.Random(f"{level}-{number}-{turn}-{time.time_ns()}"))
        timings.append(await _ask(client, body))
    return timings


def first_body(load: Load) -> dict[str, Any]:
    """What is asked before anything is measured."""
    return _body(load, random.Random(0))


def _body(load: Load, words: random.Random) -> dict[str, Any]:
    """Begins like no other, so that no cache of prefixes holds it."""
    prompt = " ".join(words.choices(WORDS, k=max(1, load.prompt_tokens)))
    return {
        "model": load.model,
        "messages": [{"role": "user", "content": f"{words.random():.9f} {prompt}"}],
        "max_tokens": load.max_tokens,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(client: "httpx2.AsyncClient", body: dict[str, Any]) -> Timing:
    import httpx2

    timing = Timing()
    begun = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                timing.error = _message(answer.status_code, await answer.aread())
            else:
                await _read(answer, timing, begun)
    except (httpx2.HTTPError, ValueError) as error:
        timing.error = str(error) or type(error).__name__
    return timing


async def _read(answer: "httpx2.Response", timing: Timing, begun: float) -> None:
    last = begun
    pieces = 0
    async for line in answer.aiter_lines():
        if (event := event_of(line)) is None:
            continue
        if error := event.get("error"):
            timing.error = str(error.get("message", error))
            return
        if usage := event.get("usage"):
            timing.tokens = usage["completion_tokens"]
            timing.prompt_tokens = usage["prompt_tokens"]
        if any(_text(choice.get("delta") or {}) for choice in event.get("choices", ())):
            now = time.perf_counter()
            if timing.first is None:
                timing.first = now - begun
            else:
                timing.gaps.append(now - last)
            last = now
            pieces += 1
    # Servers that tell no usage send about a token in each piece.
    timing.tokens = timing.tokens or pieces


def _text(delta: dict[str, Any]) -> str:
    names = ("content", "reasoning_content", "reasoning")
    return next((str(delta[name]) for name in names if delta.get(name)), "")


def _message(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body[:200].decode(errors='replace')}"


class _Observed:
    """The most that our server's own figures came to; `state` is None at any other server."""

    state: ServerState | None = None


@asynccontextmanager
async def _observed(client: "httpx2.AsyncClient", model: str) -> AsyncIterator[_Observed]:
    observed = _Observed()
    before = await _model_facts(client, model)
    if before is None:
        yield observed
        return

    async def watch() -> None:
        running = waiting = 0
        while True:
            facts = await _model_facts(client, model) or before
            running = max(running, facts["running"])
            waiting = max(waiting, facts["waiting"])
            observed.state = ServerState(
                running, waiting, max(0, facts["preempted"] - before["preempted"])
            )
            await asyncio.sleep(SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield observed
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _model_facts(client: "httpx2.AsyncClient", model: str) -> dict[str, Any] | None:
    import httpx2

    try:
        answer = await client.get("/admin/models")
        models: list[dict[str, Any]] = answer.json()["models"]
        return next((one for one in models if model in (one["id"], *one["aliases"])), None)
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None
