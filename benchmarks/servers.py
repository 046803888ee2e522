"""The servers that are compared: how each is started, known to be ready, measured and ended.

Every measured thing runs in processes of its own; nothing here imports MLX.
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from benchmarks.measures import (
    Answer,
    ClientTask,
    Endpoint,
    Job,
    Sample,
    sample_of_answers,
)

ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT = 300.0
_STOP_TIMEOUT = 20.0
_JOB_TIMEOUT = 2 * 3600.0
_WITH_OPENBLAS = ("-m", "benchmarks.with_openblas")


@dataclass(frozen=True)
class Bench:
    """What every measurement of one run has in common."""

    model: Path
    logs: Path
    openblas_for_peers: bool

    def peer(self, *module: str) -> list[str]:
        """The command that runs a Python module which does not load OpenBLAS by itself."""
        launcher = _WITH_OPENBLAS if self.openblas_for_peers else ("-m",)
        return [sys.executable, *launcher, *module]


Measure = Callable[[Bench, Sequence[Job]], Iterator[Sample]]


def measure_ours(bench: Bench, jobs: Sequence[Job]) -> Iterator[Sample]:
    """mlx-server, over HTTP."""
    port = _free_port()
    command = [sys.executable, "-m", "mlx_server", "serve", "--model", str(bench.model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with _running("ours", command, bench) as process:
        _await_ready(process, f"http://127.0.0.1:{port}/ready", bench.logs / "ours.log")
        yield from _over_http(Endpoint("127.0.0.1", port, bench.model.name), jobs)


def measure_mlx_lm(bench: Bench, jobs: Sequence[Job]) -> Iterator[Sample]:
    """mlx_lm.server with its defaults, over HTTP."""
    port = _free_port()
    command = bench.peer("mlx_lm", "server", "--model", str(bench.model))
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with _running("mlx_lm", command, bench) as process:
        _await_ready(process, f"http://127.0.0.1:{port}/health", bench.logs / "mlx_lm.log")
        yield from _over_http(Endpoint("127.0.0.1", port, "default_model"), jobs)


def measure_in_process(bench: Bench, jobs: Sequence[Job]) -> Iterator[Sample]:
    """mlx-lm's `batch_generate`, without a server."""
    command = bench.peer("benchmarks.in_process", str(bench.model))
    log = bench.logs / "in_process.log"
    with log.open("ab") as errors:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(jobs),
            timeout=_JOB_TIMEOUT * len(jobs),
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"in_process ended with {done.returncode}; {_tail(log)}")
    yield from msgspec.json.decode(done.stdout, type=list[Sample])


MEASURES: dict[str, Measure] = {
    "ours": measure_ours,
    "mlx_lm": measure_mlx_lm,
    "in_process": measure_in_process,
}


def _over_http(endpoint: Endpoint, jobs: Sequence[Job]) -> Iterator[Sample]:
    for job in jobs:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.client"],
            input=msgspec.json.encode(ClientTask(endpoint, job)),
            timeout=_JOB_TIMEOUT,
            capture_output=True,
            cwd=ROOT,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the client failed:\n{done.stderr.decode(errors='replace')}")
        answers = msgspec.json.decode(done.stdout, type=list[Answer])
        yield sample_of_answers(answers, job.max_tokens)


@contextlib.contextmanager
def _running(name: str, command: list[str], bench: Bench) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command` for as long as the block lasts, then ends it and all its descendants."""
    with (bench.logs / f"{name}.log").open("ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the server.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
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
        if _answers_ok(url):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{url} was not ready within {_START_TIMEOUT:.0f} s; {_tail(log)}")


def _answers_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return f"the end of {log.name}:\n" + "\n".join(lines)
