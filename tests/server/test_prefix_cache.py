"""What the prefix cache does for those who ask over HTTP, and what it may cost."""

import asyncio
import random
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import CHAT, TEXT, Server, ask, serving
from tests.support.tiny import build_tiny_model

MESSAGE = "Tell me what the weather will be like in the mountains, and what to wear there. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


def turn(*said: str) -> dict[str, Any]:
    """A chat whose messages are by user and assistant in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 40}


async def test_a_chat_goes_on_where_it_was_in_the_next_turn_and_after_a_restart(
    tmp_path: Path,
) -> None:
    for name in ("tiny", "fresh"):
        build_tiny_model(tmp_path / "models" / name, context=4096)
    with serving(tmp_path, "--model", "tiny") as server:
        async with server.client() as client:
            first = await ask(client, CHAT, turn(MESSAGE * 10))
            assert cached(first.usage) == 0
            again = turn(MESSAGE * 10, first.text, "And by the sea?")
            second = await ask(client, CHAT, again)
            assert cached(second.usage) >= prompt(first.usage) - 32
            streamed = await ask(
                client, CHAT, again | {"stream": True, "stream_options": {"include_usage": True}}
            )
            assert cached(streamed.usage) >= cached(second.usage)
            assert streamed.text == second.text
        status = (await server.idle("tiny"))["prefix_cache"]
        everything = [first.usage, second.usage, streamed.usage]
        assert status["prompt_tokens"] == sum(map(prompt, everything))
        assert status["cached_tokens"] == sum(map(cached, everything))
        assert await metric(server, "vllm:prefix_cache_hits_total") == status["cached_tokens"]
    with serving(tmp_path, "--model", "tiny") as server:
        async with server.client() as client:
            later = await ask(client, CHAT, again)
            assert cached(later.usage) >= prompt(first.usage) - 32
            # The same model, of which nothing was ever kept.
            plain = await ask(client, CHAT, again | {"model": "fresh"})
            assert cached(plain.usage) == 0
    assert plain.text == second.text == later.text


async def test_mixed_requests_stay_within_the_budget_with_the_cache_full(
    tmp_path: Path, model: Path
) -> None:
    await mixed(tmp_path, model, 32)


@pytest.mark.soak
async def test_a_thousand_mixed_requests_stay_within_the_budget_with_the_cache_full(
    tmp_path: Path, model: Path
) -> None:
    await mixed(tmp_path, model, 1000)


async def mixed(home: Path, model: Path, count: int) -> None:
    """Requests with shared and own beginnings, many at a time, on a server with little room."""
    generator = random.Random(4)
    settings = {"kv_cache": "4MB", "disk_cache": "4MB"}
    with serving(home, "--model", str(model), **settings) as server:
        await batch_of(server, generator, count // 4)
        before = await memory_of(server)
        for _ in range(3):
            await batch_of(server, generator, count // 4)
        after = await memory_of(server)
        state = await server.idle("tiny")
    print(f"resident: {before} → {after}, {state['prefix_cache']}")
    assert state["kv_bytes"] == 0
    assert state["prefix_cache"]["bytes"] > 1_000_000, "it was never full"
    assert after <= before * 1.03
    files = [file.stat().st_size for file in (home / "cache").rglob("*.safetensors")]
    assert 1_000_000 < sum(files) <= 4 << 20


async def batch_of(server: Server, generator: random.Random, count: int) -> None:
    """Send requests, eight at a time, and look at the engine's memory while they run."""
    places = asyncio.Semaphore(8)

    async def one() -> None:
        async with places:
            system = MESSAGE * generator.choice([1, 5, 20])
            own = " ".join(str(generator.randrange(1000)) for _ in range(generator.randrange(60)))
            body = {
                "model": "tiny",
                "prompt": system + own,
                "max_tokens": generator.randint(1, 60),
                "temperature": generator.choice([0, 0.8]),
                "seed": generator.randrange(100),
                "stream": generator.random() < 0.5,
            }
            await ask(client, TEXT, body)
            state = (await server.models())["tiny"]
            assert state["kv_bytes"] + state["prefix_cache"]["bytes"] <= 4 << 20
            assert state["memory"]["active"] <= state["need"]

    async with server.client() as client, asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


async def memory_of(server: Server) -> int:
    """Resident bytes of all the server's processes, idle."""
    await server.rested("tiny")
    processes = [psutil.Process(server.process.pid), *server.children()]
    return sum(process.memory_info().rss for process in processes)


def cached(usage: dict[str, Any] | None) -> int:
    assert usage is not None
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def prompt(usage: dict[str, Any] | None) -> int:
    assert usage is not None
    return int(usage["prompt_tokens"])


async def metric(server: Server, name: str) -> float:
    async with server.client() as client:
        text = (await client.get("/metrics")).text
    families = text_string_to_metric_families(text)
    return next(s.value for family in families for s in family.samples if s.name == name)
