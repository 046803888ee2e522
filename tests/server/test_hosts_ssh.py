"""Workers that the server starts over ssh, for which a script stands that runs the command here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest

from tests.server.test_hosts import ended
from tests.server.test_ranks import SETTINGS, ranks_of
from tests.support.hosts import over
from tests.support.server import CHAT, Server, ask, chat, logged, serving, until
from tests.support.tiny import build_tiny_model

PATIENCE = 30.0
SSH = """#!/bin/sh
# ssh [options] -- MACHINE COMMAND
while [ $# -gt 2 ]; do shift; done
exec sh -c "$2"
"""
CLOSED = """#!/bin/sh
while [ $# -gt 2 ]; do shift; done
echo "ssh: connect to host $1 port 22: Connection refused" >&2
exit 255
"""


def hosts_file(folder: Path, *names: str, backend: str = "ring") -> Path:
    file = folder / "hosts.json"
    hosts = [
        {
            "ssh": name,
            "ips": ["127.0.0.1"],
            "rdma": [None if name == other else f"rdma_{other}" for other in names],
        }
        for name in names
    ]
    file.write_text(json.dumps({"backend": backend, "envs": ["SAID=a b"], "hosts": hosts}))
    return file


def path_with(folder: Path, script: str) -> str:
    """A PATH that begins with a folder in which `ssh` is that script."""
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(script)
    (folder / "ssh").chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def worker_of(server: Server) -> psutil.Process:
    [worker] = [one for one in server.children() if "worker" in one.cmdline()]
    return worker


async def test_a_worker_is_started_takes_its_rank_comes_back_and_ends_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with a server that is killed."""
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", SSH))
    model = build_tiny_model(tmp_path / "models" / "tiny", context=4096)
    flags = ("--model", str(model), "--hosts", str(hosts_file(tmp_path, "first", "second")))
    own: dict[str, Any] = {"worker_port": 0}
    with serving(tmp_path / "home", *flags, steps_may_fail=True, **SETTINGS | own) as server:
        await takes_its_rank(server)
        await comes_back(server)
        others = [one.pid for one in server.children()]
        server.process.kill()

        async def all_over() -> bool:
            return all(map(over, others))

        await until(all_over, 3.0)


async def takes_its_rank(server: Server) -> None:
    async with server.client() as client:
        assert (await ask(client, CHAT, chat("tiny", max_tokens=5))).text
    [engine] = (await server.models())["tiny"]["replicas"]
    assert [rank["host"] for rank in engine["ranks"]] == ["", "second"]
    worker = worker_of(server)
    assert worker.environ()["SAID"] == "a b"
    assert worker.cwd() == os.getcwd()
    # The secret is made up, and stands nowhere where others could read it.
    command = worker.cmdline()
    assert command[command.index("--name") :] == ["--name", "second", "--address", "127.0.0.1"]
    assert "--secret-stdin" in command
    assert "MLX_SERVER_WORKER_SECRET" not in worker.environ()


async def comes_back(server: Server) -> None:
    ranks = await ranks_of(server)
    worker_of(server).send_signal(signal.SIGKILL)
    async with server.client() as client:
        assert (await ask(client, CHAT, chat("tiny", max_tokens=5))).text
    await ranks_of(server, other_than=ranks)
    assert logged(server.log.read_text(), "host_left")[-1]["host"] == "second"


def test_a_machine_that_ssh_does_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", CLOSED))
    model = build_tiny_model(tmp_path / "models" / "tiny")
    command = ("serve", "--port", "0", "--model", str(model))
    hosts = ("--hosts", str(hosts_file(tmp_path, "first", "second")))
    code, lines = ended(tmp_path / "home", *command, *hosts, worker_port="0", host_wait="1")
    assert code == 1
    assert len(lines) == 1, lines
    assert "host `second` is away: no worker of it has joined within 1 seconds" in lines[0]
    assert "(ssh: connect to host second port 22: Connection refused)" in lines[0]


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("jaccl", "are to talk over RDMA (jaccl), which MLX does not have there"),
        ("nccl", "this machine has 0 for 1 of them"),
    ],
)
@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="there may be such a device here")
def test_ranks_that_cannot_talk_as_the_file_says_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, why: str
) -> None:
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", SSH))
    model = build_tiny_model(tmp_path / "models" / "tiny")
    command = ("serve", "--port", "0", "--model", str(model))
    hosts = ("--hosts", str(hosts_file(tmp_path, "first", "second", backend=backend)))
    code, lines = ended(tmp_path / "home", *command, *hosts, worker_port="0")
    assert code == 1
    assert len(lines) == 1, lines
    assert why in lines[0]


def test_doctor_tells_of_machines_and_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model(tmp_path / "models" / "tiny")
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", SSH))
    hosts = ("--hosts", str(hosts_file(tmp_path, "first", "second")))
    done = subprocess.run(
        [sys.executable, "-m", "mlx_server", "doctor", "--json", *hosts, "--model", str(model)],
        capture_output=True,
        text=True,
        env=os.environ | {"MLX_SERVER_HOME": str(tmp_path / "home")},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    findings = {one["check"]: one for one in json.loads(done.stdout)}
    assert findings["host"]["detail"].startswith("second: the same versions, ")
    assert findings["files"]["detail"] == "second: tiny is the same"
    assert findings["link"]["detail"].startswith("first to second: ")
    assert "a model of 32 layers" in findings["link"]["detail"]
