"""A server that is told to stop, or that cannot start: it says so, and leaves nothing behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.test_errors import assert_refused
from tests.support.raw import Raw
from tests.support.server import CHAT, Answer, Server, ask, chat, read_stream, serving, until
from tests.support.tiny import build_tiny_model

CONTEXT = 16_384
STREAMS = 4
GRACE = 2.5
ENDLESS = {"max_tokens": CONTEXT - 100, "ignore_eos": True}
NUMBERS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
"""Every server of a test ends by SIGTERM."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT)


@asynccontextmanager
async def running(server: Server, count: int) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """So many streams that run when the block begins, and have ended when it has."""
    async with server.client() as client:
        wanted = chat("tiny", stream=True, **ENDLESS)
        tasks = [asyncio.create_task(read_stream(client, CHAT, wanted)) for _ in range(count)]
        await until(lambda: in_flight(server, count), 20)
        yield tasks
        await asyncio.wait(tasks)


async def in_flight(server: Server, count: int) -> bool:
    return bool((await server.models())["tiny"]["in_flight"] >= count)


async def ended(server: Server, seconds: float) -> float:
    """Wait for the front's end; returns how many seconds that took."""

    async def gone() -> bool:
        return server.process.poll() is not None

    return await until(gone, seconds)


def assert_nothing_left(server: Server, home: Path) -> None:
    assert server.children() == []
    assert [path for path in home.rglob("*") if path.is_socket()] == []


@pytest.mark.parametrize("number", NUMBERS)
async def test_an_idle_server_ends_with_success_in_no_time(
    tmp_path: Path, model: Path, number: int
) -> None:
    with serving(tmp_path, "--model", str(model)) as server:
        async with server.client() as client:  # which keeps its connection open
            assert (await client.get("/health")).status_code == 200
            server.process.send_signal(number)
            print(f"ended after {await ended(server, 3.0):.2f} s")
        assert server.process.returncode == 0
        assert_nothing_left(server, tmp_path)


async def test_a_stopping_server_ends_its_work_in_time_with_a_word_and_takes_no_more(
    tmp_path: Path, model: Path
) -> None:
    with serving(tmp_path, "--model", str(model), grace_period=GRACE) as server:
        async with running(server, STREAMS) as cut, server.client() as client:
            whole = asyncio.create_task(client.post(CHAT, json=chat("tiny", **ENDLESS)))
            await until(lambda: in_flight(server, STREAMS + 1), 10)
            short = chat("tiny", stream=True, max_tokens=200, ignore_eos=True)
            finishing = asyncio.create_task(read_stream(client, CHAT, short))
            await until(lambda: in_flight(server, STREAMS + 2), 10)
            server.process.terminate()
            started = time.monotonic()
            assert await until(lambda: stopping(client), 1.0) < 0.5
            for _ in range(5):  # each on a connection of its own
                answer = await client.post(CHAT, json=chat("tiny", max_tokens=1))
                assert assert_refused(answer, 503)["code"] == "server_stopping"
                assert int(answer.headers["retry-after"]) >= 1
            assert (await client.get("/health")).status_code == 200
            finished, refused = await finishing, await whole
        await ended(server, 10)
        took = time.monotonic() - started
        print(f"ended {took:.2f} s after the signal")
        assert server.process.returncode == 0
        assert_nothing_left(server, tmp_path)
    assert took < GRACE + 2.0
    assert (finished.reason, finished.done) == ("length", True)
    assert assert_refused(refused, 503)["code"] == "server_stopping"
    for answer in [task.result() for task in cut]:
        assert not answer.done
        assert answer.error is not None
        assert answer.error["code"] == "server_stopping"


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_second_signal_ends_everything_at_once(
    tmp_path: Path, model: Path, number: int
) -> None:
    with serving(tmp_path, "--model", str(model)) as server:
        async with running(server, 2) as cut, server.client() as client:
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: stopping(client), 1.0)
            server.process.send_signal(number)
            print(f"ended after {await ended(server, 1.0):.2f} s")
        # They end because the front has, which a busy machine lets them see a little later.
        await until(lambda: childless(server), 2.0)
        assert_nothing_left(server, tmp_path)
    assert server.process.returncode == 128 + number
    assert all(isinstance(task.exception(), httpx.TransportError) for task in cut)


async def childless(server: Server) -> bool:
    return server.children() == []


async def stopping(client: httpx.AsyncClient) -> bool:
    return (await client.get("/ready")).status_code == 503


async def test_a_client_that_never_reads_does_not_hold_up_the_end(
    tmp_path: Path, model: Path
) -> None:
    with serving(tmp_path, "--model", str(model), grace_period=0.5) as server:
        with Raw(server, receive_buffer=4096) as client:
            client.send_chat(
                chat("tiny", stream=True, n=8, logprobs=True, top_logprobs=20, **ENDLESS)
            )
            await until(lambda: in_flight(server, 1), 10)
            async with server.client() as another:
                await ask(another, CHAT, chat("tiny", max_tokens=200, ignore_eos=True))
            server.process.terminate()
            await ended(server, 0.5 + 3.0)
        assert server.process.returncode == 0
        assert_nothing_left(server, tmp_path)


# what keeps a server from starting


def complaint(home: Path, *flags: str, **environment: str) -> str:
    """The last line of a server that cannot start, which exits with another code than 0."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_server", "serve", "--log-level", "error", *flags],
        env=os.environ | {"MLX_SERVER_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.strip().splitlines()
    return line


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in complaint(tmp_path, "--port", str(port))


def test_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    line = complaint(tmp_path, "--port", "0", "--model", "no-such-model")
    assert "no-such-model" in line


def test_a_bad_setting_is_one_line(tmp_path: Path) -> None:
    assert "port" in complaint(tmp_path, "--port", "99999")
    assert "max_queue" in complaint(tmp_path, "--port", "0", MLX_SERVER_MAX_QUEUE="-1")


def test_an_unknown_pinned_model_is_one_line(tmp_path: Path) -> None:
    line = complaint(tmp_path, "--port", "0", MLX_SERVER_PINNED='["nobody"]')
    assert "nobody" in line


def test_an_mlx_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "mlx"
    broken.mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "core.py").write_text("raise ImportError('no suitable device')\n")
    line = complaint(tmp_path, "--port", "0", PYTHONPATH=str(broken.parent))
    assert line == "mlx-server: MLX does not work on this machine: ImportError: no suitable device"
