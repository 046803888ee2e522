"""Engines that are killed amid streams of Messages: every event comes once, and to the same end."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.conftest import LIVELY, engine_of
from tests.support.anthropic import CLOCK, Events, alike, body_of, read_events
from tests.support.server import Server, serving, until
from tests.support.tiny import build_scripted_model

STREAMS = 8
MODEL = "scripted"
NUMBERS = " ".join(map(str, range(1000, 1120)))
"""No number's token comes twice, as a scripted model wants it."""
SCRIPT = (
    f"<think>{NUMBERS}</think>So {NUMBERS.replace('1', 'x')} and "
    f'<tool_call>{{"name": "clock", "arguments": {{"zone": "{NUMBERS.replace("1", "y")}"}}}}'
    "</tool_call>"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Nothing is kept, so that usage repeats."""
    home = tmp_path_factory.mktemp("messages")
    model = build_scripted_model(home / "models" / MODEL, SCRIPT, family="qwen3", context=8192)
    with serving(home, "--model", str(model), prefix_cache="0") as server:
        yield server


async def _kill(server: Server, kills: int) -> None:
    draw = random.Random(11)
    body = body_of(MODEL, tools=[CLOCK], max_tokens=4000)
    done = False
    streams: list[Events] = []

    def seen() -> int:
        return sum(len(one.bodies) for one in streams)

    async def repeat(client: httpx.AsyncClient) -> None:
        while not done:
            streams.append(Events())
            await read_events(client, body, streams[-1])

    async with server.client(timeout=120) as client:
        expected = (await read_events(client, body)).message
        assert [block.type for block in expected.content] == ["thinking", "text", "tool_use"]
        pid = None
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(repeat(client))
            for _ in range(kills):
                pid = await engine_of(server, MODEL, pid)
                enough = seen() + draw.randint(1, 400)

                async def came(enough: int = enough) -> bool:
                    return seen() >= enough

                await until(came, LIVELY)
                os.kill(pid, signal.SIGKILL)
            done = True
    print(f"{len(streams)} streams, {kills} kills")
    assert len(streams) >= STREAMS
    for events in streams:
        assert alike(events.message) == alike(expected)
        assert events.message.usage == expected.usage


async def test_engine_kills_change_no_event_of_eight_streams(server: Server) -> None:
    await _kill(server, kills=2)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_forty_engine_kills_change_no_event_of_eight_streams(server: Server) -> None:
    await _kill(server, kills=40)
