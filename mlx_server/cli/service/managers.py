"""The service managers of the two systems: files they read, commands they are given."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_server.cli.options import CommandError
from mlx_server.cli.service.units import LABEL, UNIT, Service, launchd_plist, systemd_unit
from mlx_server.errors import reason

COMMAND_SECONDS = 60
NO_BUS = "Failed to connect to bus"
NO_SESSION = (
    "This user has no systemd session here, as in a container or after `su`: log in as the user,"
    " or have root run `loginctl enable-linger USER`"
)


class Manager(Protocol):
    """`file` is what the system reads; each method raises CommandError."""

    @property
    def file(self) -> Path: ...

    def install(self, service: Service) -> None: ...

    def remove(self) -> None: ...

    def status(self) -> str:
        """What the system says of it."""

    def logs_command(self, follow: bool) -> list[str]: ...


def manager() -> Manager:
    """This system's."""
    if sys.platform == "darwin":
        return Launchd(Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist")
    if shutil.which("systemctl") is None:
        raise CommandError("there is neither launchd nor systemd here to run a service")
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Systemd(base / "systemd" / "user" / UNIT)


def log_file() -> Path:
    """Launchd's services keep their own."""
    return Path.home() / "Library" / "Logs" / "mlx-server" / "server.log"


@dataclass(frozen=True)
class Launchd:
    file: Path

    def install(self, service: Service) -> None:
        service.log.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            _tried("launchctl", "bootout", self._target)
        with _kept_only_if_installed(self.file):
            _write(self.file, launchd_plist(service))
            _ran("launchctl", "bootstrap", self._domain, str(self.file))

    def remove(self) -> None:
        _tried("launchctl", "bootout", self._target)
        self.file.unlink(missing_ok=True)

    def status(self) -> str:
        return _ran("launchctl", "print", self._target)

    def logs_command(self, follow: bool) -> list[str]:
        # -F goes on with the next file when the log rotates.
        return ["tail", "-n", "200", *(["-F"] if follow else []), str(log_file())]

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"

    @property
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"


@dataclass(frozen=True)
class Systemd:
    file: Path

    def install(self, service: Service) -> None:
        with _kept_only_if_installed(self.file):
            _write(self.file, systemd_unit(service).encode())
            _ran("systemctl", "--user", "daemon-reload")
            _ran("systemctl", "--user", "enable", UNIT)
            _ran("systemctl", "--user", "restart", UNIT)

    def remove(self) -> None:
        _tried("systemctl", "--user", "disable", "--now", UNIT)
        self.file.unlink(missing_ok=True)
        _tried("systemctl", "--user", "daemon-reload")

    def status(self) -> str:
        return _tried("systemctl", "--user", "--no-pager", "--full", "status", UNIT)

    def logs_command(self, follow: bool) -> list[str]:
        last = ["--no-pager", "--output", "cat", "--lines", "200"]
        return ["journalctl", "--user", "--unit", UNIT, *last, *(["--follow"] if follow else [])]


def _write(file: Path, content: bytes) -> None:
    """For this user alone: keys may be in it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as output:
            output.write(content)
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}") from error


@contextmanager
def _kept_only_if_installed(file: Path) -> Iterator[None]:
    """A service that the system did not take would begin with the next login all the same."""
    before = file.read_bytes() if file.exists() else None
    try:
        yield
    except CommandError:
        file.unlink(missing_ok=True)
        if before is not None:
            _write(file, before)
        raise


def _ran(*command: str) -> str:
    done = _run(command)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()).rstrip(".")
        advice = f". {NO_SESSION}" if NO_BUS in said else ""
        raise CommandError(f"`{' '.join(command)}` failed: {said}{advice}")
    return done.stdout


def _tried(*command: str) -> str:
    """What it says, whether it succeeds or not."""
    done = _run(command)
    return done.stdout or done.stderr


def _run(command: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"`{' '.join(command)}` cannot be run: {reason(error)}") from error
