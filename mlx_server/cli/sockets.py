"""The sockets that `serve` listens on."""

import errno
import socket
import sys
from ipaddress import ip_address
from typing import Any

from mlx_server.cli.options import CommandError

SEND_BUFFER = 128 << 10
"""Bytes buffered for a client that does not read."""

Address = tuple[socket.AddressFamily, tuple[Any, ...]]


class PortInUse(CommandError):
    """Another program, or another server of ours, listens there."""


def find_addresses(host: str, port: int) -> list[Address]:
    """Raises CommandError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CommandError(f"setting host: {host!r} is no address here") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def advice_on(port: int) -> str:
    """What to do about one that is in use."""
    tool = f"lsof -nP -iTCP:{port} -sTCP:LISTEN"
    if sys.platform.startswith("linux"):
        tool = f"ss -ltnp 'sport = :{port}'"
    return f"`{tool}` names it; end it, or say another --port"


def is_local(addresses: list[Address]) -> bool:
    return all(ip_address(str(address[0]).split("%")[0]).is_loopback for _, address in addresses)


def bind(host: str, port: int, addresses: list[Address]) -> list[socket.socket]:
    """One per address, all on one port, not yet listening. Raises CommandError."""
    sockets: list[socket.socket] = []
    for family, (name, _, *rest) in addresses:
        try:
            sockets.append(_bound(family, (name, port, *rest)))
        except OSError as error:
            # `localhost` includes an IPv6 address even where IPv6 is off.
            if len(addresses) > 1 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            kind = PortInUse if error.errno == errno.EADDRINUSE else CommandError
            raise kind(f"cannot listen on {host} port {port}: {error.strerror}") from error
        port = sockets[-1].getsockname()[1]
    if not sockets:
        raise CommandError(f"setting host: {host!r} is no address of this machine")
    return sockets


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by connections. The system's default is megabytes.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
