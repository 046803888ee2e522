"""Workers started over ssh, as MLX's launcher starts its processes: in the same folder, by the same
Python, with a host file's variables.

ssh runs for as long as the worker: when it ends, so does the worker's standard input, with which
that ends. The secret goes the same way.
"""

import asyncio
import logging
import shlex
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from mlx_server.engine.spawn import next_line
from mlx_server.errors import reason
from mlx_server.events import event
from mlx_server.models.hosts.hostfile import HostFile, Machine

OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=2")
MIN_DELAY, MAX_DELAY = 0.5, 15.0
"""Seconds between starts; doubles, until one has lasted for longer."""
SHOWN_CHARACTERS = 300

log = logging.getLogger("mlx_server.hosts")


@dataclass(frozen=True)
class Place:
    """`folder`: which must be there if it was `told`. `server`: where workers join."""

    python: str
    folder: str
    told: bool
    server: str


def command(machine: Machine, envs: Sequence[str], place: Place) -> list[str]:
    """What starts a machine's worker, in whatever shell its user has."""
    folder = shlex.quote(place.folder)
    enter = f"cd {folder} || exit 1" if place.told else f"if [ -d {folder} ]; then cd {folder}; fi"
    variables = [variable.split("=", 1) for variable in envs]
    worker = [place.python, "-m", "mlx_server", "worker", "--secret-stdin"]
    worker += ["--join", place.server, "--name", machine.ssh]
    worker += [part for address in machine.ips for part in ("--address", address)]
    script = "; ".join(
        [
            enter,
            *(f"export {name}={shlex.quote(value)}" for name, value in variables),
            f"exec {shlex.join(worker)}",
        ]
    )
    options = [part for option in OPTIONS for part in ("-o", option)]
    return ["ssh", "-T", *options, "--", machine.ssh, f"exec sh -c {shlex.quote(script)}"]


class SshWorkers:
    """Keeps a worker on each of a file's other machines. `troubles`: why one is not there."""

    def __init__(
        self, file: HostFile, place: Place, secret: str, troubles: MutableMapping[str, str]
    ) -> None:
        self._file = file
        self._place = place
        self._secret = secret
        self._troubles = troubles

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for machine in self._file.others:
                    group.create_task(self._keep(machine), name=f"ssh {machine.ssh}")
        except* Exception as errors:
            log.error(event("ssh_failed"), exc_info=errors)

    async def _keep(self, machine: Machine) -> None:
        delay = MIN_DELAY
        while True:
            started = time.monotonic()
            await self._run(machine)
            delay = MIN_DELAY if time.monotonic() - started > MAX_DELAY else delay
            await asyncio.sleep(delay)
            delay = min(MAX_DELAY, 2 * delay)

    async def _run(self, machine: Machine) -> None:
        name = machine.ssh
        try:
            process = await asyncio.create_subprocess_exec(
                *command(machine, self._file.envs, self._place),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the server; uvloop knows no groups
            )
        except OSError as error:
            self._troubles[name] = f"ssh cannot be run: {reason(error)}"
            return
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            if not process.stdin.is_closing():  # else it has ended, and has said why
                process.stdin.write(f"{self._secret}\n".encode())
            while line := await next_line(process.stderr):
                said = line.decode(errors="replace").strip()[:SHOWN_CHARACTERS]
                self._troubles[name] = said
                log.info(event("host_log", host=name, line=said))
            await process.wait()
        finally:
            process.stdin.close()
            if process.returncode is None:
                process.terminate()
            code = await process.wait()
            log.info(event("host_left", host=name, code=code))
