"""Engines that are killed amid streams of each protocol: each event comes once, to the same end."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from ollama import ChatResponse

from tests.faults.conftest import LIVELY, engine_of
from tests.support import anthropic, responses
from tests.support.ollama import COUNTS, check_order, said
from tests.support.server import Server, serving, until
from tests.support.tiny import build_scripted_model

Events = list[dict[str, Any]]
Read = Callable[[httpx.AsyncClient, Events], Awaitable[object]]
"""Reads a stream, whose events come to the list; returns what repeats of it."""

STREAMS = 8
MODEL = "scripted"
NUMBERS = " ".join(map(str, range(1000, 1030)))
"""No number's token comes twice, as a scripted model wants it."""
CALL = '<tool_call>{"name": "%s", "arguments": {"%s": "%s"}}</tool_call>'
SCRIPT = (
    f"<think>{NUMBERS}</think>So {NUMBERS.replace('1', 'x')} and "
    + CALL % ("clock", "zone", NUMBERS.replace("1", "y"))
    + CALL % ("patch", "input", NUMBERS.replace("1", "z"))
)
NAMES = ("clock", "patch")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Nothing is kept of prompts, so that usage repeats."""
    home = tmp_path_factory.mktemp("protocols")
    model = build_scripted_model(home / "models" / MODEL, SCRIPT, family="qwen3", context=8192)
    with serving(home, "--model", str(model), prefix_cache="0") as server:
        yield server


async def messages(client: httpx.AsyncClient, into: Events) -> object:
    tools = [{"name": name, "input_schema": {}} for name in NAMES]
    body = anthropic.body_of(MODEL, tools=tools, max_tokens=4000)
    events = await anthropic.read_events(client, body, anthropic.Events(into))
    message = events.message
    kinds = [block.type for block in message.content]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    return anthropic.alike(message), message.usage


async def stored_responses(client: httpx.AsyncClient, into: Events) -> object:
    tools = [
        {"type": "function", "name": "clock", "parameters": {}, "strict": False},
        {"type": "custom", "name": "patch"},
    ]
    body = {"model": MODEL, "input": "Hello", "tools": tools, "max_output_tokens": 4000}
    response = await responses.streamed(client, body, into)
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["reasoning", "message", "function_call", "custom_tool_call"]
    assert (await client.get(f"{responses.RESPONSES}/{response['id']}")).json() == response
    return responses.alike(response)


async def ollama(client: httpx.AsyncClient, into: Events) -> object:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in NAMES]
    body = {"model": MODEL, "messages": anthropic.HELLO, "tools": tools}
    async with client.stream("POST", "/api/chat", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            into.append(json.loads(line))
    check_order(into, ChatResponse)
    texts, thoughts = ("".join(parts) for parts in zip(*map(said, into), strict=True))
    assert texts
    assert thoughts
    calls = [call["function"] for line in into for call in line["message"].get("tool_calls", ())]
    assert [call["name"] for call in calls] == list(NAMES)
    return texts, thoughts, calls, [into[-1][name] for name in COUNTS]


async def amid_kills(server: Server, kills: int, read: Read) -> list[object]:
    """What streams come to that are read again and again while their engine is killed."""
    draw = random.Random(11)
    begun: list[Events] = []
    ends: list[object] = []
    done = False

    def seen() -> int:
        return sum(map(len, begun))

    async def repeat(client: httpx.AsyncClient) -> None:
        while not done:
            begun.append([])
            ends.append(await read(client, begun[-1]))

    async with server.client(timeout=120) as client, asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(repeat(client))
        pid = None
        for _ in range(kills):
            pid = await engine_of(server, MODEL, pid)
            enough = seen() + draw.randint(1, 200)

            async def came(enough: int = enough) -> bool:
                return seen() >= enough

            await until(came, LIVELY)
            os.kill(pid, signal.SIGKILL)
        done = True
    print(f"{len(ends)} streams, {kills} kills")
    return ends


@pytest.mark.parametrize("read", [messages, stored_responses, ollama])
@pytest.mark.parametrize("kills", [1, pytest.param(40, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
async def test_engine_kills_change_no_event_of_eight_streams(
    server: Server, read: Read, kills: int
) -> None:
    async with server.client() as client:
        expected = await read(client, [])
    ends = await amid_kills(server, kills, read)
    assert len(ends) >= STREAMS
    assert all(end == expected for end in ends)
