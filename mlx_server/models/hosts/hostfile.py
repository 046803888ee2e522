"""MLX's host files: which machines a model is divided among. `mlx.distributed_config` writes them.

A JSON list, or an object with the list under `hosts`, of objects with `ssh`, by which ssh reaches a
machine, and `ips`, its addresses for the ring. `envs` of the object are variables for workers. With
`backend` "jaccl" or "jaccl-ring" machines talk by RDMA, through the devices that `rdma` of each
lists for all of them; in a ring only neighbours have any. With "nccl" their NVIDIA GPUs talk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import Annotated, Self

import msgspec

from mlx_server.engine.protocol import Fabric, Nccl, Rdma, RdmaDevices
from mlx_server.errors import Unavailable, reason

Variable = Annotated[str, msgspec.Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*=")]


BACKENDS = ("ring", "jaccl", "jaccl-ring", "nccl")
OVER_RDMA = BACKENDS[1:3]


class HostsFileError(Unavailable):
    """The message is one line that names the file."""


class NoDevice(Exception):
    """By which ranks could reach each other; `host` is one of the machines."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(why)
        self.host = host


class Machine(msgspec.Struct, frozen=True):
    ssh: Annotated[str, msgspec.Meta(pattern=r"^[^-\s][^\s]*$")]
    ips: list[str] = []
    rdma: RdmaDevices = []


class _File(msgspec.Struct, frozen=True):
    hosts: list[Machine]
    backend: str = ""
    envs: list[Variable] = []


@dataclass(frozen=True)
class HostFile:
    """The first machine is this one."""

    machines: tuple[Machine, ...]
    envs: tuple[str, ...] = ()
    backend: str = "ring"

    @property
    def here(self) -> Machine:
        return self.machines[0]

    @property
    def others(self) -> tuple[Machine, ...]:
        return self.machines[1:]

    @property
    def over_rdma(self) -> bool:
        return self.backend in OVER_RDMA

    def fabric(self, names: Sequence[str]) -> Fabric | None:
        """Between this machine and these others; None for the ring. Raises NoDevice."""
        if self.backend == "nccl":
            return Nccl()
        if not self.over_rdma:
            return None
        place = {machine.ssh: i for i, machine in enumerate(self.machines)}
        if unknown := [name for name in names if name not in place]:
            raise NoDevice(unknown[0], "the hosts file lists no RDMA devices of it")
        chosen = [0, *(place[name] for name in names)]
        devices = [[self.machines[one].rdma[other] for other in chosen] for one in chosen]
        around = self.backend == "jaccl-ring"
        for one, row in enumerate(devices):
            for other in neighbours(one, len(chosen)) if around else range(len(chosen)):
                if one != other and row[other] is None:
                    name, peer = (self.machines[chosen[i]].ssh for i in (one, other))
                    raise NoDevice(
                        name if one else peer,
                        f"the hosts file lists no RDMA device from {name} to {peer}",
                    )
        return Rdma(devices, around)

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
        return cls(tuple(file.hosts), tuple(file.envs), file.backend or "ring")


def neighbours(place: int, size: int) -> set[int]:
    """In a ring of that size."""
    return {(place - 1) % size, (place + 1) % size}


def _fault(file: _File) -> str | None:
    if file.backend == "mpi":
        return "with mpi, mpirun starts all ranks, and starts none again: take the back end ring"
    if file.backend not in ("", *BACKENDS):
        return f"the back end {file.backend} is none of {', '.join(BACKENDS)}"
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
    if file.backend not in OVER_RDMA:
        return None
    for i, host in enumerate(file.hosts):
        if len(host.rdma) != len(file.hosts) or host.rdma[i] is not None:
            return f"`rdma` of {host.ssh} has to list a device for each host, and null for itself"
    return None
