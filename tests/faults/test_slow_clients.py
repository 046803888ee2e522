"""Clients that never read what they asked for: they cost little, for a while, and harm nobody."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.raw import Raw
from tests.support.server import CHAT, Server, ask, chat, serving, until
from tests.support.tiny import build_tiny_model

FEW, CLIENTS = 4, 32
CONTEXT = 32_768
SOAK_SECONDS = 60.0
PAUSED_SECONDS = 30.0
"""Within which streams that nobody reads have to pause, much less than it takes to end them."""
MOST_GROWTH = 50 << 20
SEND_TIMEOUT = 2.0
LARGE = {"stream": True, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
"""Some kilobytes for each token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """A server that waits for readers longer than the tests last."""
    home = tmp_path_factory.mktemp("slow")
    flags = ("--model", str(model), "--max-batch", str(CLIENTS + 4))
    with serving(home, *flags, send_timeout=300, prefix_cache="0") as server:
        yield server


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """A server that does not wait for readers."""
    home = tmp_path_factory.mktemp("strict")
    with serving(home, "--model", str(model), send_timeout=SEND_TIMEOUT) as server:
        yield server


@asynccontextmanager
async def never_reading(server: Server, count: int) -> AsyncIterator[None]:
    """That many clients that ask for all the model can say, and read nothing of it."""
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(Raw(server, receive_buffer=4096))
            client.send_chat(chat("tiny", max_tokens=CONTEXT - 100, **LARGE))
        yield
    await server.idle("tiny", 10)


async def tokens_per_second(server: Server, seconds: float) -> float:
    """What a client gets that asks again and again for about `seconds`."""
    tokens, started = 0, time.monotonic()
    async with server.client() as client:
        while time.monotonic() - started < seconds:
            await ask(client, CHAT, chat("tiny", max_tokens=50, ignore_eos=True, stream=True))
            tokens += 50
    return tokens / (time.monotonic() - started)


async def growth_while(server: Server, seconds: float) -> tuple[int, float]:
    """The most by which the front's memory grows meanwhile, in bytes, and the tokens per second
    of somebody else."""
    front = psutil.Process(server.process.pid)
    before = most = front.memory_info().rss
    async with never_reading(server, CLIENTS):
        other = asyncio.create_task(tokens_per_second(server, seconds))
        while not other.done():
            await asyncio.wait([other], timeout=0.2)
            most = max(most, front.memory_info().rss)
    return most - before, await other


async def test_streams_that_nobody_reads_pause_and_cost_the_front_little_memory(
    server: Server,
) -> None:
    await tokens_per_second(server, 1.0)
    read = (await server.idle("tiny"))["prefix_cache"]["prompt_tokens"]

    async def all_paused() -> bool:
        """All are there, their prompts have been computed, and nothing more is."""
        state = (await server.models())["tiny"]
        computed = state["prefix_cache"]["prompt_tokens"] > read
        return bool(state["in_flight"] == FEW and computed and state["kv_bytes"] == 0)

    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    async with never_reading(server, FEW):
        took = await until(all_paused, PAUSED_SECONDS)
        grown = front.memory_info().rss - before
    print(f"they paused after {took:.1f} s, and the front grew by {grown / 2**20:.1f} MiB")
    assert grown < MOST_GROWTH * FEW / CLIENTS


@pytest.mark.soak
async def test_clients_that_never_read_leave_others_their_speed(server: Server) -> None:
    usual = await tokens_per_second(server, SOAK_SECONDS)
    grown, speed = await growth_while(server, SOAK_SECONDS)
    print(f"the front grew by {grown / 2**20:.1f} MiB; {usual:.0f} and {speed:.0f} tokens/s")
    assert grown < MOST_GROWTH
    assert speed > 0.9 * usual


async def test_a_client_that_never_reads_is_cut_off_and_its_work_ended(strict: Server) -> None:
    with Raw(strict, receive_buffer=4096) as client:
        client.send_chat(chat("tiny", max_tokens=CONTEXT - 100, n=8, **LARGE))
        await strict.works("tiny")
        # The client stays, so nothing but its being cut off ends this.
        await strict.idle("tiny", 60)


async def test_a_client_that_reads_slowly_is_not_cut_off(strict: Server) -> None:
    with Raw(strict, receive_buffer=4096) as client:
        client.send_chat(chat("tiny", max_tokens=2000, n=8, **LARGE))
        started, received = time.monotonic(), 0
        while time.monotonic() - started < 2 * SEND_TIMEOUT:
            received += len(await asyncio.to_thread(client.socket.recv, 2048))
            await asyncio.sleep(0.1)  # this client is slow
    assert received > 20 * 1024
    await strict.idle("tiny", 60)
