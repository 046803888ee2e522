"""What the processes ask of the system: open files, and sockets between them."""

import resource
import socket

import pytest

from mlx_server import server
from mlx_server.engine import spawn
from mlx_server.server import OPEN_MAX, raise_open_file_limit


class Limits:
    """A system's limits of open files, which refuses more than `permits` whatever is stated."""

    def __init__(self, soft: int, hard: int, permits: int) -> None:
        self.soft, self.hard, self.permits = soft, hard, permits

    def get(self, which: int) -> tuple[int, int]:
        return self.soft, self.hard

    def set(self, which: int, limits: tuple[int, int]) -> None:
        if limits[0] > self.permits:
            raise ValueError("current limit exceeds maximum limit")
        self.soft, self.hard = limits


@pytest.mark.parametrize(
    ("soft", "hard", "permits", "connections", "reached"),
    [
        (256, resource.RLIM_INFINITY, 1 << 20, 1024, None),
        (256, resource.RLIM_INFINITY, OPEN_MAX, 50_000, OPEN_MAX),
        (256, resource.RLIM_INFINITY, 300, 1024, 256),
        (1024, 4096, 4096, 50_000, 4096),
        (1 << 20, 1 << 20, 1 << 20, 1024, 1 << 20),
    ],
    ids=["a Mac", "more than a Mac permits", "nothing to gain", "a hard limit", "enough already"],
)
def test_the_limit_of_open_files_is_raised_as_far_as_the_system_permits(
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    hard: int,
    permits: int,
    connections: int,
    reached: int | None,
) -> None:
    limits = Limits(soft, hard, permits)
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.set)
    raise_open_file_limit(connections)
    wanted = connections + server.SPARE_CONNECTIONS + server.OTHER_FILES
    assert limits.soft == (wanted if reached is None else reached)
    assert limits.hard == hard


def test_both_ends_of_a_processes_socket_ask_for_a_mebibyte_each_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    class Recording(socket.socket):
        def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]
            asked.append((option, value))
            raise OSError("no more buffer space")

    def pair() -> tuple[socket.socket, socket.socket]:
        ends = make()
        return Recording(fileno=ends[0].detach()), Recording(fileno=ends[1].detach())

    make = socket.socketpair
    monkeypatch.setattr(spawn.socket, "socketpair", pair)
    one, other = spawn.socket_pair()
    with one, other:
        buffers = [socket.SO_SNDBUF, socket.SO_RCVBUF]
        assert asked == [(buffer, 1 << 20) for buffer in 2 * buffers]
        one.sendall(b"works all the same")
        assert other.recv(64) == b"works all the same"
