"""How a server and a worker show each other that they know the secret.

Each sends 32 random bytes and proves itself by an HMAC-SHA256 (RFC 2104) over both sides', so that
nothing overheard can be used again, or sent back. What follows is neither encrypted nor signed.
"""

import asyncio
import contextlib
import hmac
import secrets
import socket
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from mlx_server.errors import reason
from mlx_server.models.hosts.connection import Connection, ConnectionLost
from mlx_server.models.hosts.messages import (
    MAX_OPENING,
    NONCE_BYTES,
    VERSION,
    Accepted,
    Answer,
    Challenge,
    Denied,
    decode_answer,
    decode_challenge,
    decode_verdict,
)

OPENING_SECONDS = 5.0
MIN_SECRET = 16
"""Bytes; a shorter one could be guessed from an opening that somebody has overheard."""
WRONG_SECRET = "the secret is not the same"

Side = Literal["server", "worker"]
T = TypeVar("T")


class NotTrusted(Exception):
    """The other side does not know the secret, or is of another version."""


async def admit(connection: Connection, secret: bytes) -> None:
    """The server's side. Raises ConnectionLost, NotTrusted."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    await connection.send(Challenge(VERSION, nonce))
    answer = await _next(connection, decode_answer)
    expected = _proof(secret, "worker", nonce, answer.nonce)
    if len(answer.nonce) != NONCE_BYTES or not hmac.compare_digest(answer.proof, expected):
        with contextlib.suppress(ConnectionLost):
            await connection.send(Denied(WRONG_SECRET))
        raise NotTrusted(WRONG_SECRET)
    await connection.send(Accepted(_proof(secret, "server", nonce, answer.nonce)))


async def connect(host: str, port: int, secret: bytes) -> Connection:
    """The worker's side. Raises ConnectionLost, NotTrusted."""
    try:
        async with asyncio.timeout(OPENING_SECONDS):
            connection = await _connected(host, port)
            try:
                await _introduce(connection, secret)
            except BaseException:
                connection.close()
                raise
            return connection
    except TimeoutError:
        raise ConnectionLost("no answer") from None
    except OSError as error:
        raise ConnectionLost(reason(error)) from error


async def _connected(host: str, port: int) -> Connection:
    """By IPv4, which is all that MLX's ring speaks."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await loop.sock_connect(sock, found[0][4])
        return Connection(sock)
    except BaseException:
        sock.close()
        raise


async def _introduce(connection: Connection, secret: bytes) -> None:
    challenge = await _next(connection, decode_challenge)
    if challenge.version != VERSION or len(challenge.nonce) != NONCE_BYTES:
        raise NotTrusted("the server is of another version")
    nonce = secrets.token_bytes(NONCE_BYTES)
    await connection.send(Answer(nonce, _proof(secret, "worker", challenge.nonce, nonce)))
    verdict = await _next(connection, decode_verdict)
    if isinstance(verdict, Denied):
        raise NotTrusted(verdict.reason)
    if not hmac.compare_digest(verdict.proof, _proof(secret, "server", challenge.nonce, nonce)):
        raise NotTrusted(WRONG_SECRET)


async def _next(connection: Connection, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(await connection.receive(MAX_OPENING))
    except msgspec.MsgspecError as error:
        raise ConnectionLost("it does not speak as mlx-server does") from error


def _proof(secret: bytes, side: Side, servers: bytes, workers: bytes) -> bytes:
    return hmac.digest(secret, f"mlx-server {side}\0".encode() + servers + workers, "sha256")
