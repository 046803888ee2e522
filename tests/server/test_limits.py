"""Connections, headers, bodies, and what a caller may ask for in a minute: all have bounds."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from mlx_server.api.http.limits import Window
from tests.server.conftest import MODEL
from tests.server.test_errors import assert_refused
from tests.support.raw import Raw
from tests.support.server import CHAT, PLAIN, Server, chat, serving, until

PATIENCE = 2.0
CONNECTIONS = 8
SPARE = 64
HEADER_BYTES = 16 * 1024
GROWTH = 20 << 20
REQUESTS_PER_MINUTE = 12
TOKENS_PER_MINUTE = 200
CALLERS = ("frequent", "another", "wordy", "wordy-stream", "leaving", "greedy", "modest")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server with little patience and room for few connections."""
    with serving(
        tmp_path_factory.mktemp("bounded"),
        "--model",
        str(tiny_model),
        receive_timeout=PATIENCE,
        max_connections=CONNECTIONS,
        max_header_bytes=HEADER_BYTES,
    ) as server:
        yield server


@pytest.fixture
def raw(bounded: Server) -> Iterator[Raw]:
    with Raw(bounded) as connection:
        yield connection


def assert_told(raw: Raw, status: int, code: str) -> None:
    """The connection is closed after an error in OpenAI's shape."""
    told, body = raw.answer()
    assert (told, json.loads(body)["error"]["code"]) == (status, code)


# what must arrive in time


def test_a_connection_that_says_nothing_is_closed(raw: Raw) -> None:
    started = time.monotonic()
    assert raw.answer() == (0, b"")
    assert PATIENCE - 0.1 < time.monotonic() - started < PATIENCE + 2


def test_headers_that_dribble_have_a_deadline_however_steadily_they_come(raw: Raw) -> None:
    started = time.monotonic()
    raw.socket.sendall(raw.head())
    raw.socket.settimeout(0.1)
    received = b""
    while not received and time.monotonic() - started < 5 * PATIENCE:
        raw.socket.sendall(b"x")
        try:
            received = raw.socket.recv(1024)
        except TimeoutError:
            continue
    assert received.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < PATIENCE + 2


@pytest.mark.parametrize("sent", [b"", b'{"model":'])
def test_a_body_that_stalls_is_given_up(raw: Raw, sent: bytes) -> None:
    raw.socket.sendall(raw.head("Content-Length: 1000", "") + sent)
    assert_told(raw, 408, "receive_timeout")


def test_a_body_that_trickles_is_given_up(raw: Raw) -> None:
    raw.socket.sendall(raw.head("Content-Length: 1000", ""))
    raw.socket.settimeout(0.1)
    started = time.monotonic()
    received = b""
    while not received and time.monotonic() - started < 5 * PATIENCE:
        raw.socket.sendall(b"x")
        try:
            received = raw.socket.recv(1024)
        except TimeoutError:
            continue
    assert received.startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_that_keeps_its_pace_is_waited_for(bounded: Server) -> None:
    body = json.dumps(chat(MODEL, max_tokens=1, user="u" * 16_000)).encode()

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            time.sleep(0.2)  # this client is slow
            yield body[start : start + 1000]

    with httpx.Client(base_url=bounded.url, timeout=30, **PLAIN) as client:
        answer = client.post(CHAT, content=slowly())
    assert answer.status_code == 200, answer.text
    assert answer.elapsed.total_seconds() > 1.5 * PATIENCE


# what must not be too large


@pytest.mark.parametrize(
    "headers",
    [f"X-A: {'a' * HEADER_BYTES}", "\r\n".join(["X-A: a"] * (HEADER_BYTES // 4)), "a" * 200_000],
    ids=["one header", "many headers", "a header without end"],
)
def test_headers_that_are_too_large_are_refused(raw: Raw, headers: str) -> None:
    raw.socket.sendall(raw.head(headers, ""))
    assert_told(raw, 431, "headers_too_large")


def test_endless_headers_cost_no_memory(bounded: Server, raw: Raw) -> None:
    front = psutil.Process(bounded.process.pid)
    before = front.memory_info().rss
    raw.socket.sendall(raw.head())
    raw.socket.sendall(b"X-Endless: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(2000):
            raw.socket.sendall(b"x" * 100_000)
    assert front.memory_info().rss - before < GROWTH


def test_what_is_not_http_is_refused_in_our_shape(raw: Raw) -> None:
    raw.socket.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
    assert_told(raw, 400, "invalid_http")


# connections


@asynccontextmanager
async def crowd(server: Server, count: int) -> AsyncIterator[list[Raw]]:
    """That many connections, which all have a request under way and then say no more."""
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Raw(server)) for _ in range(count)]
        for one in crowd:
            one.socket.sendall(one.head("Content-Length: 9", ""))
        yield crowd


async def test_connections_beyond_the_limit_get_a_503_and_health_is_answered(
    bounded: Server,
) -> None:
    async with crowd(bounded, CONNECTIONS), bounded.client() as client:
        answer = await client.post(CHAT, json=chat(MODEL, max_tokens=1))
        assert assert_refused(answer, 503)["code"] == "too_many_connections"
        assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    await answers_again(bounded)


async def test_connections_far_beyond_the_limit_are_refused_as_they_open(bounded: Server) -> None:
    async with crowd(bounded, CONNECTIONS + SPARE):
        with Raw(bounded) as one_more:
            assert_told(one_more, 503, "too_many_connections")
    await answers_again(bounded)


async def answers_again(server: Server) -> None:
    async def answers() -> bool:
        async with server.client() as client:
            return (await client.post(CHAT, json=chat(MODEL, max_tokens=1))).status_code == 200

    await until(answers, 10)


# rates


@pytest.fixture(scope="module")
def metered(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server that counts what each key asks for, and computes one request at a time."""
    with serving(
        tmp_path_factory.mktemp("metered"),
        "--model",
        str(tiny_model),
        max_batch=1,
        requests_per_minute=REQUESTS_PER_MINUTE,
        tokens_per_minute=TOKENS_PER_MINUTE,
        api_keys=list(CALLERS),
    ) as server:
        yield server


async def test_requests_beyond_the_rate_are_refused_and_headers_tell_what_is_left(
    metered: Server,
) -> None:
    async with metered.client(headers={"x-api-key": "frequent"}) as client:
        body = chat(MODEL, max_tokens=1)
        remaining = []
        for _ in range(REQUESTS_PER_MINUTE):
            answer = await client.post(CHAT, json=body)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == str(REQUESTS_PER_MINUTE)
            remaining.append(int(answer.headers["x-ratelimit-remaining-requests"]))
        assert remaining == list(reversed(range(REQUESTS_PER_MINUTE)))
        refused = await client.post(CHAT, json=body)
        assert assert_refused(refused, 429)["type"] == "rate_limit_error"
        assert 0 < int(refused.headers["retry-after"]) <= 120
        assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
        assert (await client.get("/v1/models")).status_code == 200
    async with metered.client(headers={"x-api-key": "another"}) as another:
        assert (await another.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_beyond_the_rate_are_refused_until_the_window_has_room(
    metered: Server, stream: bool
) -> None:
    key = "wordy-stream" if stream else "wordy"
    async with metered.client(headers={"x-api-key": key}) as client:
        body = chat(MODEL, max_tokens=TOKENS_PER_MINUTE + 100, ignore_eos=True, stream=stream)
        first = await client.post(CHAT, json=body)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-remaining-tokens"] == str(TOKENS_PER_MINUTE)
        refused = await client.post(CHAT, json=chat(MODEL, max_tokens=1))
        assert_refused(refused, 429)
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert int(refused.headers["retry-after"]) >= 1


async def test_the_tokens_of_a_client_that_left_are_counted(metered: Server) -> None:
    async with metered.client(headers={"x-api-key": "leaving"}) as client:
        body = chat(MODEL, max_tokens=1800, ignore_eos=True, stream=True)
        async with client.stream("POST", CHAT, json=body) as response:
            events = response.aiter_lines()
            for _ in range(3 * TOKENS_PER_MINUTE):  # lines, of which an event has two
                await anext(events)

        async def gone() -> bool:
            [model] = (await client.get("/admin/models")).json()["models"]
            return model["in_flight"] == 0

        await until(gone, 5)
        refused = await client.post(CHAT, json=chat(MODEL, max_tokens=1))
        assert assert_refused(refused, 429)["type"] == "rate_limit_error"
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.parametrize(
    ("window", "remaining", "wait"),
    [
        (Window(10, 0, 0.0, 4, 30.0), 6, 0.0),
        (Window(10, 10, 30.0, 0, 30.0), 5, 0.0),
        (Window(10, 10, 60.0, 0, 60.0), 0, 0.05),
        (Window(10, 0, 0.0, 10, 30.0), 0, 30.05),
        (Window(10, 0, 0.0, 40, 30.0), 0, 75.05),
        (Window(10, 10, 42.0, 3, 42.0), 0, 0.05),
    ],
)
def test_a_window_knows_what_is_left_and_when_there_is_room(
    window: Window, remaining: int, wait: float
) -> None:
    assert window.remaining == remaining
    assert window.seconds_to_room == pytest.approx(wait)


async def test_one_caller_with_many_requests_does_not_hold_up_another(metered: Server) -> None:
    async with (
        metered.client(headers={"x-api-key": "greedy"}) as greedy,
        metered.client(headers={"x-api-key": "modest"}) as modest,
    ):
        body = chat(MODEL, max_tokens=100, ignore_eos=True)
        many = [
            asyncio.create_task(greedy.post(CHAT, json=body)) for _ in range(REQUESTS_PER_MINUTE)
        ]
        await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
        assert (await modest.post(CHAT, json=body)).status_code == 200
        unfinished = sum(not task.done() for task in many)
        for task in many:
            task.cancel()
        await asyncio.wait(many)
    assert unfinished >= REQUESTS_PER_MINUTE - 4
