"""Connections between a server and its workers."""

import asyncio
import socket
from collections.abc import Callable

import msgspec

from mlx_server.engine.protocol import HEADER, frame
from mlx_server.errors import reason
from mlx_server.models.hosts.messages import MAX_FRAME, Alive

ALIVE_SECONDS, SILENCE_SECONDS = 1.0, 8.0
"""Between signs of life, and without any after which the other side counts as gone."""


class ConnectionLost(Exception):
    """The other side has gone, is silent, or says what it never should."""


class Connection:
    """Frames over a socket, for the tasks of one event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.own: str = sock.getsockname()[0]
        self.peer: str = sock.getpeername()[0]
        self._socket = sock
        self._sending = asyncio.Lock()

    async def send(self, message: msgspec.Struct) -> None:
        """Raises ConnectionLost."""
        try:
            async with self._sending:
                await asyncio.get_running_loop().sock_sendall(self._socket, frame(message))
        except OSError as error:
            raise ConnectionLost(reason(error)) from error

    async def receive(self, limit: int = MAX_FRAME) -> bytes:
        """The next body, of `limit` bytes at most. Raises ConnectionLost."""
        (length,) = HEADER.unpack(await self._exactly(HEADER.size))
        if length > limit:
            raise ConnectionLost(f"a frame of {length:,} bytes")
        return await self._exactly(length)

    def hand_over(self) -> socket.socket:
        """Whoever gets it reads and writes from now on."""
        self._socket.setblocking(True)
        return self._socket

    def cut(self) -> None:
        """Whoever waits for a frame hears that the connection is lost."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is lost

    def close(self) -> None:
        """Nobody may be sending or receiving."""
        self._socket.close()

    async def _exactly(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < size:
            try:
                part = await loop.sock_recv(self._socket, size - len(data))
            except OSError as error:
                raise ConnectionLost(reason(error)) from error
            if not part:
                raise ConnectionLost("the connection is closed")
            data += part
        return bytes(data)


class Talk:
    """What one side says, and a sign of life where it has nothing to say."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: asyncio.Queue[msgspec.Struct] = asyncio.Queue()

    def tell(self, message: msgspec.Struct) -> None:
        """Once `run` runs, which may have ended."""
        self._waiting.put_nowait(message)

    async def run(self, take: Callable[[bytes], None]) -> None:
        """Give `take` each body that comes. Raises ConnectionLost, at the latest when `take` raises
        msgspec.MsgspecError.
        """
        sending = asyncio.create_task(self._send())
        reading = asyncio.create_task(self._read(take))
        both = [sending, reading]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            ended = await asyncio.gather(*both, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _send(self) -> None:
        while True:
            try:
                async with asyncio.timeout(ALIVE_SECONDS):
                    message = await self._waiting.get()
            except TimeoutError:
                message = Alive()
            await self._connection.send(message)

    async def _read(self, take: Callable[[bytes], None]) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    body = await self._connection.receive()
                take(body)
            except TimeoutError:
                raise ConnectionLost(f"silent for {SILENCE_SECONDS:g} seconds") from None
            except msgspec.MsgspecError as error:
                raise ConnectionLost(f"what it says makes no sense: {error}") from error
