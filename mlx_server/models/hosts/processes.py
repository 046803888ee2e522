"""What a worker runs for a server: a rank, or a whole engine whose frames it passes on."""

import asyncio
import contextlib
import logging
import socket
import sys
from typing import Protocol, Self

from mlx_server.engine.protocol import Load, frame
from mlx_server.engine.spawn import Child, next_line, socket_pair, spawn
from mlx_server.events import event

RELEASE_SECONDS = 1.0
"""For a process to end by itself, once the server has let it go."""
PASS_BYTES = 1 << 18

log = logging.getLogger("mlx_server.hosts")


class Running(Protocol):
    """It ends at the latest with this process."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> None:
        """For its end."""

    async def end(self) -> int:
        """At once; returns its exit code."""


async def start(server: socket.socket, model: str, load: Load) -> Running:
    """A rank if `load` has hosts, else an engine. `server` leads to rank 0, or to the front. Raises
    OSError.
    """
    if load.hosts:
        return await RankProcess.start(server, load)
    return await EngineProcess.start(server, model, load)


async def until_over(running: Running, released: asyncio.Event) -> None:
    """Its end, or its being late after its release."""
    ending = asyncio.create_task(running.wait())
    releasing = asyncio.create_task(released.wait())
    try:
        await asyncio.wait([ending, releasing], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([ending], timeout=RELEASE_SECONDS)
    finally:
        ending.cancel()
        releasing.cancel()


class RankProcess:
    """It ends when `lifeline` closes."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._lifeline = lifeline

    @classmethod
    async def start(cls, server: socket.socket, load: Load) -> Self:
        own, its = socket_pair()
        inherited = (server.fileno(), its.fileno())
        with its:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "mlx_server.engine.follower"),
                    *map(str, inherited),
                    pass_fds=inherited,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is for the worker
                )
            except BaseException:
                own.close()
                raise
        with contextlib.suppress(OSError):  # it has ended
            own.sendall(frame(load))
        return cls(process, own)

    async def wait(self) -> None:
        await self._process.wait()

    async def end(self) -> int:
        if self._process.returncode is None:
            self._process.kill()
        try:
            return await self._process.wait()
        finally:
            self._lifeline.close()


class EngineProcess:
    """To the engine this process is its front. It ends when either side closes its connection."""

    def __init__(
        self, child: Child, model: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = child.process.pid
        self._child = child
        self._model = model
        self._passing = asyncio.create_task(self._pass_all(reader, writer))
        self._telling = asyncio.create_task(self._tell())

    @classmethod
    async def start(cls, server: socket.socket, model: str, load: Load) -> Self:
        front = server.dup()
        front.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=front)
        try:
            child = await spawn("mlx_server.engine.worker")
        except BaseException:
            writer.close()
            raise
        child.writer.write(frame(load))
        return cls(child, model, reader, writer)

    async def wait(self) -> None:
        """And until its last frame has been passed on."""
        await self._child.process.wait()
        await asyncio.wait([self._passing])

    async def end(self) -> int:
        await self._child.kill()
        await asyncio.wait([self._telling], timeout=RELEASE_SECONDS)
        for task in (self._passing, self._telling):
            task.cancel()
        await asyncio.gather(self._passing, self._telling, return_exceptions=True)
        return await self._child.process.wait()

    async def _pass_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        down = asyncio.create_task(_pass(reader, self._child.writer))
        up = asyncio.create_task(_pass(self._child.reader, writer))
        try:
            await asyncio.wait([down, up], return_when=asyncio.FIRST_COMPLETED)
        finally:
            down.cancel()
            up.cancel()
            self._child.writer.close()
            writer.close()

    async def _tell(self) -> None:
        stderr = self._child.process.stderr
        assert stderr is not None
        while line := await next_line(stderr):
            said = line.decode(errors="replace").rstrip()
            log.info(event("engine_log", model=self._model, pid=self.pid, line=said))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side has closed."""
    with contextlib.suppress(OSError):
        while data := await reader.read(PASS_BYTES):
            writer.write(data)
            await writer.drain()
