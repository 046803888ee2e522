"""Engines that are killed amid streams of Responses: each event comes once, to the same end."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.faults.conftest import LIVELY, engine_of
from tests.support.responses import alike, streamed, whole
from tests.support.server import Server, serving, until
from tests.support.tiny import build_scripted_model

STREAMS = 8
MODEL = "scripted"
NUMBERS = " ".join(map(str, range(1000, 1060)))
"""No number's token comes twice, as a scripted model wants it."""
CALL = '<tool_call>{"name": "%s", "arguments": {"%s": "%s"}}</tool_call>'
SCRIPT = (
    f"<think>{NUMBERS}</think>So {NUMBERS.replace('1', 'x')} and "
    + CALL % ("clock", "zone", NUMBERS.replace("1", "y"))
    + CALL % ("patch", "input", NUMBERS.replace("1", "z"))
)
TOOLS = [
    {"type": "function", "name": "clock", "parameters": {}, "strict": False},
    {"type": "custom", "name": "patch"},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Nothing is kept of prompts, so that usage repeats."""
    home = tmp_path_factory.mktemp("responses")
    model = build_scripted_model(home / "models" / MODEL, SCRIPT, family="qwen3", context=8192)
    with serving(home, "--model", str(model), prefix_cache="0") as server:
        yield server


async def _kill(server: Server, kills: int) -> None:
    draw = random.Random(12)
    body = {"model": MODEL, "input": "Hello", "tools": TOOLS, "max_output_tokens": 4000}
    done = False
    streams: list[list[dict[str, Any]]] = []
    answers: list[dict[str, Any]] = []

    def seen() -> int:
        return sum(map(len, streams))

    async def repeat(client: httpx.AsyncClient) -> None:
        while not done:
            streams.append([])
            answers.append(await streamed(client, body, streams[-1]))

    async with server.client(timeout=120) as client:
        expected = await whole(client, body)
        kinds = [item["type"] for item in expected["output"]]
        assert kinds == ["reasoning", "message", "function_call", "custom_tool_call"]
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
        print(f"{len(answers)} streams, {kills} kills")
        assert len(answers) == len(streams) >= STREAMS
        for answer in answers:
            assert alike(answer) == alike(expected)
            assert (await client.get(f"/v1/responses/{answer['id']}")).json() == answer


async def test_engine_kills_change_no_event_of_eight_streams_of_responses(server: Server) -> None:
    await _kill(server, kills=1)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_forty_engine_kills_change_no_event_of_eight_streams_of_responses(
    server: Server,
) -> None:
    await _kill(server, kills=40)
