"""Machines with addresses of their own: network namespaces of Linux, where they are permitted."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Machine:
    """`inside` is its address to the others, `outside` to the tests, if they can reach it."""

    name: str
    inside: str
    outside: str | None = None

    @property
    def run(self) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.name]

    def link(self, state: str) -> None:
        """Set its link to the others `up` or `down`."""
        ip("-n", self.name, "link", "set", "inside", state)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many that reach each other; the tests reach the first. Skips where that cannot be."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    mark = f"mlx{os.getpid()}"
    network = os.getpid() % 200
    made = [
        Machine(
            name=f"{mark}n{number}",
            inside=f"10.213.{network}.{number + 1}",
            outside=f"10.214.{network}.2" if number == 0 else None,
        )
        for number in range(count)
    ]
    bridge, outside = f"{mark}b", f"{mark}o"
    try:
        try:
            for one in made:
                ip("netns", "add", one.name)
            _connect(made, bridge, outside, network)
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted: {error}")
        yield made
    finally:
        for one in (*made, Machine(bridge, "")):
            with contextlib.suppress(OSError):
                ip("netns", "del", one.name)
        with contextlib.suppress(OSError):
            ip("link", "del", outside)


def _connect(made: list[Machine], bridge: str, outside: str, network: int) -> None:
    """By a bridge in a namespace of its own."""
    ip("netns", "add", bridge)
    ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
    ip("-n", bridge, "link", "set", "bridge", "up")
    for number, one in enumerate(made):
        port = f"port{number}"
        peer = ("peer", "name", "inside", "netns", one.name)
        ip("-n", bridge, "link", "add", port, "type", "veth", *peer)
        ip("-n", bridge, "link", "set", port, "master", "bridge", "up")
        ip("-n", one.name, "addr", "add", f"{one.inside}/24", "dev", "inside")
        for device in ("lo", "inside"):
            ip("-n", one.name, "link", "set", device, "up")
    first = made[0]
    ip("link", "add", outside, "type", "veth", "peer", "name", "outside", "netns", first.name)
    ip("addr", "add", f"10.214.{network}.1/24", "dev", outside)
    ip("link", "set", outside, "up")
    ip("-n", first.name, "addr", "add", f"{first.outside}/24", "dev", "outside")
    ip("-n", first.name, "link", "set", "outside", "up")
