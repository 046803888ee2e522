"""A model divided among machines, for which workers on this one stand, behind a real server."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_ranks import MANY, SETTINGS, all_of, asked, ranks_of
from tests.support.command import environment, refusal
from tests.support.hosts import SECRET, Worker, free_port, over, working
from tests.support.server import CHAT, Answer, Server, ask, ask_through, logged, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_adapter, build_tiny_model

__all__ = ["environment"]

PATIENCE = 60.0
ENDS_SECONDS = 2.0
TOKENS = 40
ALONE = "alone"
ADAPTER = "poet"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


class Second:
    """Another machine, whose worker may end and come back."""

    def __init__(self, home: Path, port: int, stack: contextlib.ExitStack) -> None:
        self.port = port
        self.worker: Worker
        self._home = home
        self._stack = stack

    def come(self) -> None:
        self.worker = self._stack.enter_context(working(self._home, self.port))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Second]:
    with contextlib.ExitStack() as stack:
        made = Second(tmp_path_factory.mktemp("second"), free_port(), stack)
        made.come()
        yield made


class First:
    """This machine, whose server may end and come back. It has the model to itself as well."""

    def __init__(self, home: Path, model: Path, port: int, stack: contextlib.ExitStack) -> None:
        self.server: Server
        self._home = home
        self._flags = ("--model", str(model), "--worker", "second")
        here = {ALONE: [], f"{ALONE}@{ADAPTER}": []}
        self._settings = ours(port) | {"workers_by_model": here, "hang_timeout": 2}
        self._stack = stack
        shutil.copytree(model, home / "models" / ALONE)
        for base in ("tiny", ALONE):
            build_tiny_adapter(model, home / "adapters" / base / ADAPTER)

    def come(self) -> None:
        may = {"may_hang": True, "steps_may_fail": True}
        made = serving(self._home, *self._flags, **may, **self._settings)
        self.server = self._stack.enter_context(made)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, model: Path, second: Second) -> Iterator[First]:
    with contextlib.ExitStack() as stack:
        made = First(tmp_path_factory.mktemp("home"), model, second.port, stack)
        made.come()
        yield made


@pytest.fixture
def pair(first: First) -> Server:
    return first.server


@pytest.fixture(scope="module")
async def expected(first: First) -> list[Answer]:
    """What one process answers."""
    async with first.server.client(timeout=300) as client:
        answers = await all_of(client, asked(TOKENS, ALONE))
        [engine] = (await first.server.models())[ALONE]["replicas"]
        assert len(engine["ranks"]) <= 1
        await client.post(f"/admin/models/{ALONE}/unload")
    return answers


def ours(port: int) -> dict[str, Any]:
    own = {"worker_host": "127.0.0.1", "worker_port": port, "worker_secret": SECRET}
    return SETTINGS | own


async def heals(
    pair: Server, expected: list[Answer], harm: Callable[[list[int]], Awaitable[None]]
) -> None:
    """Streams that run while `harm` is done get what one process answers."""
    ranks = await ranks_of(pair)
    async with pair.client(timeout=300) as client:
        answers = await ask_through(lambda: harm(ranks), client, asked(TOKENS))
        for answer, known in zip(answers, expected, strict=True):
            same(answer, known)
    after = await ranks_of(pair, other_than=ranks)
    assert all(map(over, ranks)), (ranks, after)


async def test_the_text_is_that_of_one_process(
    pair: Server, second: Second, expected: list[Answer]
) -> None:
    async with pair.client(timeout=300) as client:
        for answer, known in zip(await all_of(client, asked(TOKENS)), expected, strict=True):
            same(answer, known)
    state = (await pair.models())["tiny"]
    ranks = state["replicas"][0]["ranks"]
    assert [(rank["rank"], rank["host"]) for rank in ranks] == [(0, ""), (1, "second")]
    assert [rank["pid"] for rank in ranks] == [state["pid"], second.worker.ranks()[0].pid]
    # What is reserved here is this machine's rank.
    assert state["need"] < sum(rank["memory"]["limit"] for rank in ranks)


async def test_an_adapter_is_applied_on_each_machine(
    pair: Server, second: Second, expected: list[Answer]
) -> None:
    adapted = [f"{base}@{ADAPTER}" for base in ("tiny", ALONE)]
    async with pair.client(timeout=300) as client:
        answers = [await all_of(client, asked(TOKENS, model)) for model in adapted]
        for answer, known in zip(*answers, strict=True):
            same(answer, known)
        assert answers[0][0].text != expected[0].text
        [engine] = (await pair.models())[adapted[0]]["replicas"]
        assert [rank["host"] for rank in engine["ranks"]] == ["", "second"]
        for model in adapted:
            await client.post(f"/admin/models/{model}/unload")


async def test_a_rank_elsewhere_that_is_killed_is_replaced(
    pair: Server, expected: list[Answer]
) -> None:
    async def kill(ranks: list[int]) -> None:
        os.kill(ranks[1], signal.SIGKILL)

    await heals(pair, expected, kill)


async def test_a_rank_elsewhere_that_hangs_is_replaced(
    pair: Server, expected: list[Answer]
) -> None:
    async def stop(ranks: list[int]) -> None:
        os.kill(ranks[1], signal.SIGSTOP)

    await heals(pair, expected, stop)


async def test_a_machine_that_goes_and_comes_back(
    pair: Server, second: Second, expected: list[Answer]
) -> None:
    """Its rank ends with it, wherever it was."""

    async def leave(ranks: list[int]) -> None:
        second.worker.process.kill()

        async def ended() -> bool:
            return over(ranks[1])

        await until(ended, ENDS_SECONDS)
        second.come()

    await heals(pair, expected, leave)
    lost = [one for one in logged(pair.log.read_text(), "engine_ended") if one.get("lost_host")]
    assert [one["lost_host"] for one in lost] == ["second"]


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_whatever_ends_no_stream_notices(pair: Server, second: Second) -> None:
    """Any rank, the worker with its rank, the worker stopped until it counts as gone."""
    rng = random.Random(6)
    ends = [rng.choice(["engine", "rank", "worker"]) for _ in range(20)] + ["stopped"]
    async with pair.client(timeout=600) as client:
        bodies = asked(400, streams=MANY)
        expected = await all_of(client, bodies)
        answers = ties = 0
        done = asyncio.Event()

        async def repeat(body: dict[str, Any], known: Answer) -> None:
            nonlocal answers, ties
            while not done.is_set():
                ties += same(await ask(client, CHAT, body), known)
                answers += 1

        async with asyncio.TaskGroup() as group:
            for body, known in zip(bodies, expected, strict=True):
                group.create_task(repeat(body, known))
            ranks: list[int] = []
            for end in ends:
                ranks = await ranks_of(pair, other_than=ranks)
                await asyncio.sleep(rng.random() / 2)
                match end:
                    case "engine":
                        os.kill(ranks[0], signal.SIGKILL)
                    case "rank":
                        os.kill(ranks[1], signal.SIGKILL)
                    case "worker":
                        second.worker.process.kill()
                        second.come()
                    case "stopped":
                        second.worker.process.send_signal(signal.SIGSTOP)
                        await until(lambda: counts_as_lost(pair), 15)
                        second.worker.process.send_signal(signal.SIGCONT)
            await ranks_of(pair, other_than=ranks)
            done.set()
    print(f"{len(ends)} ends, {answers} answers, {ties} near-ties")
    assert ties <= 1 + answers // 4


async def counts_as_lost(server: Server) -> bool:
    lost = logged(server.log.read_text(), "worker_lost")
    return "silent" in lost[-1]["reason"] if lost else False


async def test_all_ends_with_the_server(first: First, second: Second) -> None:
    """Even one that is killed; the worker waits for the next."""
    await ranks_of(first.server)
    processes = [one.pid for one in (*second.worker.ranks(), *first.server.engines())]
    assert len(processes) == 2
    first.server.process.kill()

    async def all_over() -> bool:
        return all(map(over, processes))

    await until(all_over, ENDS_SECONDS)
    first.come()
    assert len(second.worker.ranks()) == 1


# what ends the command in one line


def ended(home: Path, *command: str, **variables: str) -> tuple[int, list[str]]:
    """The exit code, and the lines that are no events."""
    own = {"MLX_SERVER_HOME": str(home), "HF_HOME": str(home / "hub")}
    own |= {f"MLX_SERVER_{name.upper()}": value for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_server", *command],
        capture_output=True,
        text=True,
        env=os.environ | own,
        timeout=60,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return done.returncode, lines


async def test_a_worker_with_another_secret_ends(pair: Server, second: Second, home: Path) -> None:
    join = ("worker", "--join", f"127.0.0.1:{second.port}", "--name", "second")
    code, lines = await asyncio.to_thread(ended, home, *join, worker_secret="another of sixteen")
    where = f"127.0.0.1:{second.port}"
    assert lines == [f"mlx-server: the server at {where} refuses: the secret is not the same"]
    assert code == 1
    refused = logged(pair.log.read_text(), "worker_refused")
    assert refused[-1]["reason"] == "the secret is not the same"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_server_whose_only_model_lacks_a_machine_ends(model: Path, home: Path) -> None:
    code, lines = ended(
        home,
        *("serve", "--port", "0", "--model", str(model), "--worker", "second"),
        worker_secret=SECRET,
        worker_port="0",
        worker_host="127.0.0.1",
        host_wait="0.5",
    )
    away = "host `second` is away: no worker of it has joined within 0.5 seconds"
    assert code == 1
    assert len(lines) == 1, lines
    assert away in lines[0]


def test_a_file_of_hosts_that_is_wrong_is_one_line(
    environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "hosts.json"
    file.write_text('[{"ssh": "first", "ips": ["127.0.0.1"]}]')
    line = refusal(environment, "serve", "--port", "0", "--hosts", str(file))
    assert line == f"mlx-server: hosts file {file}: it names fewer than two hosts"


def test_a_port_for_workers_that_is_in_use_is_one_line(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        own = {"worker_secret": SECRET, "worker_host": "127.0.0.1", "worker_port": str(port)}
        code, lines = ended(home, "serve", "--port", "0", "--worker", "second", **own)
    why = f"cannot listen for workers on 127.0.0.1 port {port}: Address already in use"
    assert (code, lines) == (1, [f"mlx-server: {why}"])
