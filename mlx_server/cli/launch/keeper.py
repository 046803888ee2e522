"""The process that cleans up behind a launched program, however that ends.

`python -m mlx_server.cli.launch.keeper PARENT FOLDER [SERVER…]` runs the server's command, its
output in FOLDER/server.log, for as long as the process PARENT, which started this one, lives; then
it ends the server and removes FOLDER.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

LOG = "server.log"
ENDED = "the server has ended"
POLL_SECONDS = 0.2
STOP_SECONDS = 60.0
"""More than the server's default grace period."""


def main() -> None:
    parent, folder, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    server: subprocess.Popen[bytes] | None = None
    try:
        if command:
            server = _started(command, folder / LOG)
        _wait(parent, server, folder / LOG)
    finally:
        if server is not None:
            _stop(server)
        shutil.rmtree(folder, ignore_errors=True)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def _wait(parent: int, server: subprocess.Popen[bytes] | None, log: Path) -> None:
    told = False
    while os.getppid() == parent:
        if server is not None and not told and server.poll() is not None:
            told = True
            with log.open("a", encoding="utf-8") as output:
                output.write(f"{ENDED}\n")
        time.sleep(POLL_SECONDS)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        # A second signal makes it kill its engines and itself.
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
