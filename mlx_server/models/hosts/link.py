"""How fast the network between two machines is, found by one connection. Blocks."""

import socket
import time
from statistics import median

import msgspec

TOKEN_BYTES = 16
ROUNDS = 200
BULK_BYTES = 64 << 20
CHUNK = 1 << 20
SECONDS = 20.0
"""In which a measurement must be over."""


class Link(msgspec.Struct, frozen=True):
    """`round_trip`: seconds; `rate`: bytes per second."""

    round_trip: float
    rate: float


def answer(listener: socket.socket, token: bytes) -> None:
    """Serve one measurement, to whoever shows `token` first. Raises OSError."""
    with listener:
        listener.settimeout(SECONDS)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _exactly(connection, TOKEN_BYTES) != token:
            return
        for _ in range(ROUNDS):
            connection.sendall(_exactly(connection, 1))
        left = BULK_BYTES
        while left:
            left -= len(_some(connection, min(left, CHUNK)))
        connection.sendall(b"\0")


def measure(address: str, port: int, token: bytes) -> Link:
    """From the other end. Raises OSError."""
    with socket.create_connection((address, port), SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(token)
        trips = [_trip(connection) for _ in range(ROUNDS)]
        chunk = bytes(CHUNK)
        started = time.perf_counter()
        for _ in range(BULK_BYTES // CHUNK):
            connection.sendall(chunk)
        _exactly(connection, 1)
        return Link(median(trips), BULK_BYTES / (time.perf_counter() - started))


def _trip(connection: socket.socket) -> float:
    started = time.perf_counter()
    connection.sendall(b"\0")
    _exactly(connection, 1)
    return time.perf_counter() - started


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += _some(connection, size - len(data))
    return data


def _some(connection: socket.socket, most: int) -> bytes:
    data = connection.recv(most)
    if not data:
        raise ConnectionError("the other side has gone")
    return data
