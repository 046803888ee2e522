"""Where real programs play: the real server, a user's folders, and what the server saw."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.clients.installing import Wanted, install
from tests.support.rehearsal import Play, build_rehearsed_model
from tests.support.server import Server, logged

PROGRAM_SECONDS = 600
Request = tuple[str, str, int]
KEPT = ("LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Run:
    """How a program ended, and its requests: method, path and status."""

    code: int
    output: str
    requests: list[Request]

    def went_well(self) -> bool:
        return self.code == 0 and all(200 <= status < 300 for _, _, status in self.requests)

    def __str__(self) -> str:
        seen = Counter(self.requests)
        lines = [f"{count}x {' '.join(map(str, one))}" for one, count in seen.items()]
        return "\n".join([f"exit code {self.code}", *lines, self.output[-6000:]])


@dataclass(frozen=True)
class Stage:
    server: Server
    models: Path
    installs: Path
    user: Path
    """Of this test alone: the user's home, and `work`, where the program runs."""

    @property
    def work(self) -> Path:
        return self.user / "work"

    def cast(self, name: str, play: Play, family: str = "qwen3") -> str:
        """A model of that name, which plays. It replaces one of that name."""
        folder = self.models / name
        shutil.rmtree(folder, ignore_errors=True)
        build_rehearsed_model(folder, play, family=family)
        return name

    def install(self, name: str, wanted: Wanted) -> Path:
        return install(self.installs, name, wanted)

    def run(
        self,
        command: list[str],
        commands: Path,
        seconds: float = PROGRAM_SECONDS,
        **environment: str,
    ) -> Run:
        """Run one of the programs in `commands`, unattended."""
        before = self.mark()
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.environment(commands) | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
        return Run(done.returncode, done.stdout, self.requests_since(before))

    def mark(self) -> int:
        """Where the server's log ends now."""
        return len(self.server.log.read_bytes())

    def requests_since(self, mark: int) -> list[Request]:
        log = self.server.log.read_bytes()[mark:].decode(errors="replace")
        told = logged(log, "request")
        return [(one["method"], one["path"], one["status"]) for one in told]

    def launch(
        self, program: str, model: str, commands: Path, *arguments: str, **environment: str
    ) -> Run:
        """Run it as `mlx-server launch` does."""
        port = self.server.url.rpartition(":")[2]
        command = [sys.executable, "-m", "mlx_server", "launch", program]
        command += ["--port", port, "--model", model, "--", *arguments]
        return self.run(command, commands, **environment)

    def environment(self, commands: Path) -> dict[str, str]:
        """Of a user who has nothing set."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        path = os.pathsep.join([str(commands), "/usr/local/bin", "/usr/bin", "/bin"])
        return kept | {"PATH": path, "HOME": str(self.user), "TERM": "dumb", "NO_COLOR": "1"}
