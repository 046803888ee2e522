"""The servers that are compared: how each is started, known to be ready, and ended.

Every measured thing runs in processes of its own; nothing here imports MLX.
"""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.client import Endpoint
from benchmarks.measures import Figures

ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT = 300.0
_STOP_TIMEOUT = 60.0
_JOBS_TIMEOUT = 8 * 3600.0
_WITH_OPENBLAS = ("-m", "benchmarks.with_openblas")
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Bench:
    """What every measurement of one run has in common."""

    model: Path
    logs: Path
    openblas_for_peers: bool
    seed: int
    tokens: int
    """Completion tokens a request, where a cell does not set its own number."""
    requests: int
    """Requests that a stream sends one after the other, in the cells of throughput."""
    streams: tuple[int, ...] | None
    """Streams at a time in those cells; their own choice if unset."""

    def peer(self, *module: str) -> list[str]:
        """The command that runs a Python module which does not load OpenBLAS by itself."""
        launcher = _WITH_OPENBLAS if self.openblas_for_peers else ("-m",)
        return [sys.executable, *launcher, *module]


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    endpoint: Endpoint
    process: psutil.Process


@dataclass(frozen=True)
class Server:
    """A server with an OpenAI-compatible API."""

    name: str
    command: Callable[[Bench, int], list[str]]
    """What starts it for a bench's model, on a port."""
    ready: str
    """The path that answers 200 once the model can generate."""
    model: str | None = None
    """What requests call the model; the first of `/v1/models` if unset."""

    @contextlib.contextmanager
    def running(
        self, bench: Bench, home: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Iterator[Running]:
        """Runs the server with `env`; mlx-server keeps its files in `home`, else a fresh folder."""
        log = bench.logs / f"{self.name}.log"
        port = _free_port()
        with contextlib.ExitStack() as stack:
            if home is None:
                home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            whole = {**os.environ, "MLX_SERVER_HOME": str(home), **(env or {})}
            process = stack.enter_context(_process(self.command(bench, port), log, whole))
            _await_ready(process, f"http://{_HOST}:{port}{self.ready}", log)
            model = self.model or _first_model(port)
            yield Running(Endpoint(_HOST, port, model), psutil.Process(process.pid))


def _ours(bench: Bench, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlx_server", "serve", "--model", str(bench.model)]
    return [*command, "--host", _HOST, "--port", str(port)]


def _mlx_lm(bench: Bench, port: int) -> list[str]:
    command = bench.peer("mlx_lm", "server", "--model", str(bench.model))
    return [*command, "--host", _HOST, "--port", str(port)]


OURS = Server("ours", _ours, ready="/ready")
MLX_LM = Server("mlx_lm", _mlx_lm, ready="/health", model="default_model")


def peer(name: str, template: str) -> Server:
    """Any other server; `template` is its command with `{model}` and `{port}` in it."""

    def command(bench: Bench, port: int) -> list[str]:
        return [
            part.replace("{model}", str(bench.model)).replace("{port}", str(port))
            for part in shlex.split(template)
        ]

    return Server(name, command, ready="/v1/models")


class Job(msgspec.Struct, frozen=True):
    """The work of one cell of throughput: `prompts`, `streams` at a time, after a warm-up."""

    streams: int
    prompts: list[str]
    warm_up: list[str]
    max_tokens: int
    temperature: float
    top_p: float


def in_process(bench: Bench, jobs: list[Job]) -> list[Figures]:
    """What mlx-lm's `batch_generate` makes of `jobs`, without a server."""
    log = bench.logs / "in_process.log"
    with log.open("ab") as errors:
        done = subprocess.run(
            bench.peer("benchmarks.in_process", str(bench.model)),
            input=msgspec.json.encode(jobs),
            timeout=_JOBS_TIMEOUT,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"in_process ended with {done.returncode}; {_tail(log)}")
    return msgspec.json.decode(done.stdout, type=list[Figures])


@contextlib.contextmanager
def _process(
    command: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command` for as long as the block lasts, then ends it and all its descendants."""
    with log.open("ab") as out:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the server.
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end_tree(process)


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    """Asks `process` to end, and kills what is left of its tree after a while."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
    if process.poll() is None:
        process.terminate()
    _, left = psutil.wait_procs(tree, timeout=_STOP_TIMEOUT)
    for survivor in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(left, timeout=_STOP_TIMEOUT)
    process.wait()


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}; {_tail(log)}")
        with contextlib.suppress(OSError):
            _get(url)
            return
        time.sleep(0.2)
    raise RuntimeError(f"{url} was not ready within {_START_TIMEOUT:.0f} s; {_tail(log)}")


def _first_model(port: int) -> str:
    listed: dict[str, Any] = json.loads(_get(f"http://{_HOST}:{port}/v1/models"))
    return str(listed["data"][0]["id"])


def _get(url: str) -> bytes:
    """The body; raises OSError where there is no answer or one with an error's status."""
    with urllib.request.urlopen(url, timeout=5) as response:
        return bytes(response.read())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return f"the end of {log.name}:\n" + "\n".join(lines)
