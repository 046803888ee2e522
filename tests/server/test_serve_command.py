"""`mlx-server serve` as a process: it starts without a model, and a signal ends it."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.command import COMMAND, environment, refusal
from tests.support.server import PLAIN
from tests.support.store import make_model

__all__ = ["environment"]


@contextmanager
def server(environment: dict[str, str], *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A server process, ended in the end."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def greeted_address(process: "subprocess.Popen[str]") -> tuple[str, int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://(\S+):(\d+)", line)
    assert found, line + (process.stderr.read() if process.stderr else "")
    return found[1], int(found[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_starts_without_a_model_lists_the_catalog_and_a_signal_ends_it_with_success(
    environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    make_model(tmp_path / "home" / "models" / "mine")
    with server(environment, "--port", "0") as process:
        host, port = greeted_address(process)
        with urllib.request.urlopen(f"http://{host}:{port}/v1/models", timeout=30) as answer:
            models = json.load(answer)["data"]
            assert answer.headers["Server"] is None
        assert [model["id"] for model in models] == ["mine"]
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - begun < 10


def test_a_second_port_answers_programs_that_look_for_ollama(environment: dict[str, str]) -> None:
    arguments = ("--port", "0", "--ollama-port", "0", "--api-key", "a-key")
    with server(environment, *arguments) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://(\S+):(\d+) and as Ollama at port (\d+)", line)
        assert found, line
        address = f"http://{found[1]}:{found[3]}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read() == b"Ollama is running"
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer a-key"}, 200),
            ({"Authorization": "Bearer a-key", "Host": "evil.example"}, 400),
        ):
            assert httpx.get(f"{address}/api/tags", headers=headers, **PLAIN).status_code == status
        taken = refusal(environment, "serve", "--port", "0", "--ollama-port", found[3])
    assert f"port {found[3]}" in taken


def test_without_a_home_to_write_a_model_is_served(
    environment: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "home")
    homes = dict.fromkeys(("MLX_SERVER_HOME", "HOME", "HF_HOME", "XDG_CACHE_HOME"), nowhere)
    with server(environment | homes, "--port", "0", "--model", str(tiny_model)) as process:
        host, port = greeted_address(process)
        body = json.dumps({"prompt": "Hello", "max_tokens": 2}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{host}:{port}/v1/completions", body), timeout=60
        ) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] > 0
        process.terminate()
        assert '"event": "model_not_locked"' in process.communicate(timeout=30)[1]


def test_it_ends_with_the_reason_when_no_model_named_can_be_loaded(
    environment: dict[str, str], tmp_path: Path
) -> None:
    models = [make_model(tmp_path / name) for name in ("odd", "strange")]
    flags = [flag for model in models for flag in ("--model", str(model))]
    with server(environment, "--port", "0", *flags) as process:
        assert process.wait(timeout=60) == 1
        last = process.communicate()[1].splitlines()[-1]
    assert last.startswith("mlx-server: Model `odd` is failed: ")
    assert "`strange` is failed: " in last


def test_a_server_whose_output_nobody_reads_answers_and_ends_well(
    environment: dict[str, str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "serve", "--port", str(port)]
    with subprocess.Popen(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(writer)
        assert process.stderr is not None
        said = next(line for line in process.stderr if "greeting_failed" in line)
        assert "Broken pipe" in said
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0
