"""The sockets of `serve`: one port for all addresses of a host, bound before anything is loaded."""

import socket

import pytest

from mlx_server.cli.options import CommandError
from mlx_server.cli.sockets import bind, find_addresses, is_local


def bound_ports(host: str, port: int = 0) -> set[int]:
    sockets = bind(host, port, find_addresses(host, port))
    try:
        return {bound.getsockname()[1] for bound in sockets}
    finally:
        for bound in sockets:
            bound.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_every_address_of_a_host_gets_the_same_free_port(host: str) -> None:
    (port,) = bound_ports(host)
    assert port > 0


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_loopback_is_local(host: str, local: bool) -> None:
    assert is_local(find_addresses(host, 0)) is local


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port}: .* in use"):
            bound_ports("127.0.0.1", port)


@pytest.mark.parametrize("host", ["not an address", "x" * 100 + ".example", "203.0.113.7"])
def test_a_host_that_is_not_ours_is_an_error_that_names_it(host: str) -> None:
    with pytest.raises(CommandError, match=host[:20]):
        bound_ports(host)
