"""MLX's host files: which machines a model is divided among. `mlx.distributed_config` writes them.

A JSON list, or an object with the list under `hosts`, of objects with `ssh`, by which ssh reaches a
machine, and `ips`, its addresses for the ring. `envs` of the object are variables for workers.
"""

from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import Annotated, Self

import msgspec

from mlx_server.errors import Unavailable, reason

Variable = Annotated[str, msgspec.Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*=")]


class HostsFileError(Unavailable):
    """The message is one line that names the file."""


class Machine(msgspec.Struct, frozen=True):
    ssh: Annotated[str, msgspec.Meta(pattern=r"^[^-\s][^\s]*$")]
    ips: list[str] = []


class _File(msgspec.Struct, frozen=True):
    hosts: list[Machine]
    backend: str = ""
    envs: list[Variable] = []


@dataclass(frozen=True)
class HostFile:
    """The first machine is this one."""

    machines: tuple[Machine, ...]
    envs: tuple[str, ...] = ()

    @property
    def here(self) -> Machine:
        return self.machines[0]

    @property
    def others(self) -> tuple[Machine, ...]:
        return self.machines[1:]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises HostsFileError."""
        try:
            content = path.read_bytes()
            if content.lstrip().startswith(b"["):
                file = _File(msgspec.json.decode(content, type=list[Machine]))
            else:
                file = msgspec.json.decode(content, type=_File)
        except (OSError, msgspec.MsgspecError) as error:
            raise HostsFileError(f"hosts file {path}: {reason(error)}") from error
        if (fault := _fault(file)) is not None:
            raise HostsFileError(f"hosts file {path}: {fault}")
        return cls(tuple(file.hosts), tuple(file.envs))


def _fault(file: _File) -> str | None:
    if file.backend not in ("", "ring"):
        return f"the back end {file.backend} is not there yet, only ring"
    if len(file.hosts) < 2:
        return "it names fewer than two hosts"
    names = [host.ssh for host in file.hosts]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"it names {twice[0]} twice"
    for host in file.hosts:
        if not host.ips or len(host.ips) != len(file.hosts[0].ips):
            return f"{host.ssh} has {len(host.ips)} `ips`; all must have as many, one at least"
        for address in host.ips:
            try:
                IPv4Address(address)
            except AddressValueError:
                return f"{address!r} of {host.ssh} is no IPv4 address, which the ring needs"
    return None
