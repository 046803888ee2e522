"""More requests at once than there is room for: each gets its answer, or a quick 429."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest

from tests.support.server import CHAT, Server, chat, serving
from tests.support.tiny import build_tiny_model

REQUESTS = 300
BATCH, QUEUE = 8, 64
REFUSAL_SECONDS = 1.0
FLOODS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    flags = ("--model", str(model), "--max-batch", str(BATCH))
    with serving(tmp_path_factory.mktemp("flood"), *flags, max_queue=QUEUE) as server:
        yield server


class Caller(asyncio.Protocol):
    """One request on a connection of its own, and when its answer began: little enough work for
    the clock to tell of the server."""

    def __init__(self, request: bytes) -> None:
        self.answer = b""
        self.seconds = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._started = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.answer:
            self.seconds = time.perf_counter() - self._started
        self.answer += data

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)

    @property
    def status(self) -> int:
        return int(self.answer.split(b" ", 2)[1])


async def flood(server: Server, body: dict[str, Any]) -> list[Caller]:
    """Callers who all come at once, when each has been answered to the end."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    loop = asyncio.get_running_loop()
    callers = [Caller(request) for _ in range(REQUESTS)]
    async with asyncio.timeout(120):
        await asyncio.gather(
            *(loop.create_connection(partial(_itself, one), host, int(port)) for one in callers)
        )
        await asyncio.gather(*(one.ended for one in callers))
    return callers


def _itself(caller: Caller) -> Caller:
    return caller


@pytest.mark.parametrize("stream", [False, True])
async def test_a_flood_is_answered_or_refused_quickly_and_nobody_is_cut_off(
    server: Server, stream: bool
) -> None:
    async with server.client() as client:
        assert (await client.post(CHAT, json=chat("tiny", max_tokens=1))).status_code == 200
    body = chat("tiny", max_tokens=100, ignore_eos=True, stream=stream)
    took = []
    for _ in range(FLOODS):
        took.append(await refusals_of(server, body))
        await server.idle("tiny", 10)
    # Others may need this machine too; no server is quicker than it is.
    assert min(took) < REFUSAL_SECONDS


async def refusals_of(server: Server, body: dict[str, Any]) -> float:
    """The 99th percentile of how long refusals took in a flood that went well, in seconds."""
    callers = await flood(server, body)
    counts = Counter(one.status for one in callers)
    refused = sorted(one.seconds for one in callers if one.status == 429)
    p99 = refused[int(0.99 * len(refused))]
    print(f"{dict(counts)}; the 99th percentile of refusals took {p99:.2f} s")
    assert set(counts) == {200, 429}
    assert counts[200] >= BATCH + QUEUE
    for one in callers:
        if one.status == 429:
            assert b"\r\nretry-after: " in one.answer
            assert b"rate_limit_error" in one.answer
        else:
            assert (b"data: [DONE]" if body["stream"] else b"finish_reason") in one.answer
    return p99
