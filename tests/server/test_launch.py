"""`mlx-server launch` as a process: the program gets a server, and nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.conftest import MODEL
from tests.support.server import CHAT, PLAIN, Server, chat

LAUNCH = [sys.executable, "-P", "-m", "mlx_server", "launch", "llm"]
SECONDS = 60.0
MARK = "TEST_LAUNCH"

PROGRAM = """\
#!{python}
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(23))
given = {{"environment": dict(os.environ), "arguments": sys.argv[1:], "pid": os.getpid()}}
print(json.dumps(given))
sys.stdout.flush()
signal.pause()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user who has a program called llm, and a folder for temporary files of their own."""
    program = tmp_path / "bin" / "llm"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "random.py").write_text("raise ImportError('the user has a module of this name')")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return os.environ | {
        MARK: str(tmp_path),
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(temporary),
        "MLX_SERVER_HOME": str(tmp_path / "home"),
        "MLX_SERVER_PORT": "9",
    }


@contextmanager
def launched(
    environment: dict[str, str], *arguments: str
) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """The process, and what the program in it says it was given."""
    process = subprocess.Popen(
        [*LAUNCH, *arguments],
        cwd=Path(environment[MARK]) / "work",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def models_told(given: dict[str, Any]) -> list[dict[str, Any]]:
    file = Path(given["environment"]["LLM_USER_PATH"]) / "extra-openai-models.yaml"
    told: list[dict[str, Any]] = json.loads(file.read_text())
    return told


def left_behind(environment: dict[str, str]) -> list[object]:
    """Processes with the mark, and temporary files."""
    found: list[object] = [*Path(environment["TMPDIR"]).glob("mlx-server-*")]
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == environment[MARK]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_clean(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + SECONDS
    while left := left_behind(environment):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_program_gets_a_server_of_its_own_and_leaves_nothing_even_when_it_is_killed(
    environment: dict[str, str], tiny_model: Path
) -> None:
    with launched(environment, "--model", str(tiny_model)) as (process, given):
        [entry] = models_told(given)
        assert entry["model_id"] == given["environment"]["LLM_MODEL"] == MODEL
        base = entry["api_base"].removesuffix("/v1")
        answer = httpx.post(base + CHAT, json=chat(MODEL, max_tokens=2), **PLAIN)
        assert answer.status_code == 200
        process.kill()
        process.wait(SECONDS)
        assert_clean(environment)


def test_a_server_that_runs_is_used_and_left_running_and_signals_are_the_programs(
    environment: dict[str, str], server: Server
) -> None:
    environment["MLX_SERVER_PORT"] = server.url.rpartition(":")[2]
    with launched(environment) as (process, given):
        assert models_told(given)[0]["api_base"] == f"{server.url}/v1"
        # The program is the process that was started: a signal needs no passing on.
        assert given["pid"] == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 23
        assert_clean(environment)
    assert httpx.get(f"{server.url}/ready", **PLAIN).status_code == 200


def test_a_server_that_cannot_start_is_one_line_and_leaves_nothing(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    done = subprocess.run(
        [*LAUNCH, "--model", str(broken)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "the server did not start" in done.stderr.splitlines()[-1]
    assert_clean(environment)
