"""Ollama's streams go on when their engine is killed: the same lines, none twice, none missing."""

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import pytest
from ollama import ChatResponse, GenerateResponse

from tests.faults.conftest import LIVELY, TINY, engine_of
from tests.support.ollama import check_order, said
from tests.support.server import Server, until

Lines = list[dict[str, Any]]
STREAMS = 8


def asked(index: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """Greedy and sampled ones, half of them chats."""
    options = {"num_predict": tokens, "temperature": index % 4 / 2, "seed": index}
    if index % 2:
        return "/api/generate", {"model": TINY, "prompt": "Tell " * index, "options": options}
    messages = [{"role": "user", "content": "Tell me " * (index + 1)}]
    return "/api/chat", {"model": TINY, "messages": messages, "options": options}


async def read(client: httpx.AsyncClient, index: int, tokens: int, into: Lines) -> None:
    path, body = asked(index, tokens)
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            into.append(json.loads(line))


async def read_all(server: Server, tokens: int, kills: int) -> list[Lines]:
    """The lines of all streams, whose engine is killed as often amid them."""
    answers: list[Lines] = [[] for _ in range(STREAMS)]
    async with server.client(timeout=120) as client, asyncio.TaskGroup() as group:
        for index, lines in enumerate(answers):
            group.create_task(read(client, index, tokens, lines))
        pid = None
        for _ in range(kills):
            pid = await engine_of(server, other_than=pid)
            enough = [len(lines) + 5 for lines in answers]

            async def have_come(enough: list[int] = enough) -> bool:
                return all(len(one) >= few for one, few in zip(answers, enough, strict=True))

            await until(have_come, LIVELY)
            os.kill(pid, signal.SIGKILL)
    return answers


async def check_kills(server: Server, tokens: int, kills: int) -> None:
    expected = await read_all(server, tokens, 0)
    answers = await read_all(server, tokens, kills)
    changed = 0
    for index, (lines, undisturbed) in enumerate(zip(answers, expected, strict=True)):
        check_order(lines, GenerateResponse if index % 2 else ChatResponse)
        assert lines[-1]["eval_count"] == undisturbed[-1]["eval_count"] == tokens
        assert lines[-1]["prompt_eval_count"] == undisturbed[-1]["prompt_eval_count"]
        changed += [*map(said, lines)] != [*map(said, undisturbed)]
    # What a prompt's pass rounds otherwise than steps may swap two tokens that are as likely.
    assert changed <= kills


async def test_eight_streams_of_ollamas_survive_a_kill(mortal: Server) -> None:
    await check_kills(mortal, tokens=200, kills=1)


@pytest.mark.soak
async def test_eight_streams_of_ollamas_survive_many_kills(mortal: Server) -> None:
    for _ in range(10):
        await check_kills(mortal, tokens=1500, kills=3)
