"""Workers for tests: the command line's own process, which stands for another machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SECRET = "a secret of the tests"
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Worker:
    process: subprocess.Popen[bytes]
    log: Path

    def ranks(self) -> list[psutil.Process]:
        """Its living processes, ranks and whole engines."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [one for one in found if is_rank(one)]

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def working(
    home: Path,
    port: int,
    name: str = "second",
    *flags: str,
    host: str = "127.0.0.1",
    before: Sequence[str] = (),
    **settings: str,
) -> Iterator[Worker]:
    """Run `mlx-server worker`, which joins that port; `settings` as environment variables, `before`
    what runs it. Nothing of it is left behind.
    """
    home.mkdir(parents=True, exist_ok=True)
    log = home / "worker.log"
    own = {"MLX_SERVER_HOME": str(home), "HF_HOME": str(home / "hub")}
    settings = {"worker_secret": SECRET} | settings
    own |= {f"MLX_SERVER_{key.upper()}": value for key, value in settings.items()}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                *(*before, sys.executable, "-m", "mlx_server", "worker"),
                *("--join", f"{host}:{port}", "--name", name, *flags),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            start_new_session=True,
        )
    worker = Worker(process, log)
    try:
        yield worker
    except BaseException:
        print(f"the worker's log ends:\n{worker.said()[-4000:]}")
        raise
    finally:
        ranks = worker.ranks()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(ranks, 2)
        for one in left:
            one.kill()
    assert not left, f"left behind: {left}"


class Three:
    """This machine, and two that go and come as they are told."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.port = free_port()
        self._folder = folder
        self._stack = stack
        self.workers: dict[str, Worker] = {}

    def come(self, name: str, **settings: str) -> None:
        home = self._folder / name
        made = self._stack.enter_context(working(home, self.port, name, **settings))
        self.workers[name] = made

    def go(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.workers[name].process.send_signal(number)


@contextlib.contextmanager
def three_machines(folder: Path) -> Iterator[Three]:
    """Two of them are workers, `second` and `third`."""
    with contextlib.ExitStack() as stack:
        made = Three(folder, stack)
        made.come("second")
        made.come("third")
        yield made


def is_rank(process: psutil.Process) -> bool:
    try:
        return not {"mlx_server.engine.follower", "mlx_server.engine.worker"}.isdisjoint(
            process.cmdline()
        )
    except psutil.Error:
        return False


def over(pid: int) -> bool:
    """Whether that process has ended, whoever has heard of it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
