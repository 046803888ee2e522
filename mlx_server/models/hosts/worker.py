"""The worker on another machine: joins a server, and takes ranks of its models.

It trusts the server to say what is computed, and decides itself where: its own folders, limits and
libraries, and whether a model's own code may run.
"""

import asyncio
import contextlib
import logging
import random
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from msgspec import structs

from mlx_server.config import Settings
from mlx_server.engine.protocol import Device, Load, frame
from mlx_server.engine.spawn import socket_pair
from mlx_server.errors import ModelNotFound, Unavailable, reason
from mlx_server.events import event
from mlx_server.models.hosts.connection import Connection, ConnectionLost, Talk
from mlx_server.models.hosts.files import ModelFiles, difference
from mlx_server.models.hosts.link import answer, measure
from mlx_server.models.hosts.messages import (
    Digests,
    Dismissed,
    Ended,
    FromServer,
    Join,
    Listen,
    Listening,
    Look,
    Measure,
    Measured,
    Refused,
    Release,
    Seen,
    Take,
    Ticket,
    Unable,
    decode_from_server,
)
from mlx_server.models.hosts.opening import NotTrusted, connect
from mlx_server.models.hosts.versions import own_versions
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.sources import ModelSources

MIN_DELAY, MAX_DELAY = 0.5, 10.0
"""Seconds between attempts to join; doubles."""
RELEASE_SECONDS = 1.0
"""For a process to end by itself, once rank 0 has gone."""

log = logging.getLogger("mlx_server.hosts")


class Unfit(Exception):
    """The rank cannot be taken here. The message is for people."""


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    async def connect(self) -> Connection:
        """Raises ConnectionLost, NotTrusted."""
        return await connect(self.host, self.port, self.secret)


@dataclass
class Rank:
    """One that the server has asked for, or does not need any more."""

    need: int
    task: asyncio.Task[None]
    released: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class RankProcess:
    """It ends when `lifeline` closes, at the latest with this process."""

    process: asyncio.subprocess.Process
    lifeline: socket.socket

    @classmethod
    async def start(cls, server: socket.socket, load: Load) -> Self:
        """`server` leads to rank 0."""
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

    async def wait(self, released: asyncio.Event) -> None:
        """For its end, or until it is late after its release."""
        ending = asyncio.create_task(self.process.wait())
        releasing = asyncio.create_task(released.wait())
        try:
            await asyncio.wait([ending, releasing], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([ending], timeout=RELEASE_SECONDS)
        finally:
            ending.cancel()
            releasing.cancel()

    async def end(self) -> int:
        """At once; returns its exit code."""
        if self.process.returncode is None:
            self.process.kill()
        try:
            return await self.process.wait()
        finally:
            self.lifeline.close()


class Worker:
    def __init__(
        self, settings: Settings, server: Server, name: str, addresses: list[str], device: Device
    ) -> None:
        self._settings = settings
        self._server = server
        self._catalog = Catalog(ModelSources.of(settings))
        self._files = ModelFiles(settings.home)
        self._device = device
        self._budget = device.budget(settings.memory_limit)
        self._join = Join(name, own_versions(), device, self._budget, addresses)
        self._ranks: dict[str, Rank] = {}
        self._replies: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Join, and again whenever the server has gone. Raises Unavailable once it is refused."""
        delay = MIN_DELAY
        while True:
            try:
                connection = await self._server.connect()
            except NotTrusted as error:
                raise Unavailable(f"the server at {self._server} refuses: {error}") from error
            except ConnectionLost as error:
                log.info(event("server_away", server=self._server, reason=error))
            else:
                delay = MIN_DELAY
                try:
                    why = await self._serve(connection)
                finally:
                    connection.close()
                log.warning(event("server_lost", server=self._server, reason=why))
            await asyncio.sleep(delay * random.uniform(0.5, 1))
            delay = min(MAX_DELAY, 2 * delay)

    async def _serve(self, connection: Connection) -> str:
        """Until the server has gone; returns why. No rank outlives it. Raises Unavailable."""
        talk = Talk(connection)
        try:
            await connection.send(self._join)
            log.info(event("joined", server=self._server, host=self._join.name))
            await talk.run(lambda body: self._take(talk, decode_from_server(body)))
        except ConnectionLost as error:
            return str(error)
        finally:
            tasks = [*(rank.task for rank in self._ranks.values()), *self._replies]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise AssertionError("talk ends with an error")

    def _take(self, talk: Talk, message: FromServer) -> None:
        match message:
            case Take(ticket=ticket, need=need):
                task = asyncio.create_task(self._hold(talk, message), name=f"rank {ticket}")
                self._ranks[ticket] = Rank(need, task)
                task.add_done_callback(lambda _: self._ranks.pop(ticket))
            case Release(ticket=ticket) if ticket in self._ranks:
                self._ranks[ticket].released.set()
            case Look() | Listen() | Measure():
                task = asyncio.create_task(self._reply(talk, message))
                self._replies.add(task)
                task.add_done_callback(self._replies.discard)
            case Dismissed(reason=why):
                raise Unavailable(f"the server at {self._server} refuses: {why}")

    async def _hold(self, talk: Talk, take: Take) -> None:
        """From its being asked for to its end."""
        rank = self._ranks[take.ticket]
        try:
            await self._until_released_are_gone(rank)
            load = await asyncio.to_thread(self._load_here, take)
            self._check_memory(rank)
            running = await self._start(take.ticket, load)
        except (Unfit, ConnectionLost, OSError, NotTrusted) as error:
            log.warning(event("rank_refused", model=take.model, reason=reason(error)))
            talk.tell(Refused(take.ticket, reason(error)))
            return
        pid = running.process.pid
        log.info(event("rank_started", model=take.model, pid=pid, bytes=take.need))
        try:
            await running.wait(rank.released)
        finally:
            code = await running.end()
            log.info(event("rank_ended", model=take.model, pid=pid, code=code))
            talk.tell(Ended(take.ticket, code))

    async def _reply(self, talk: Talk, question: Look | Listen | Measure) -> None:
        """To what `doctor` asks."""
        try:
            match question:
                case Look(id=number, model=model, folder=folder):
                    talk.tell(Seen(number, await asyncio.to_thread(self._seen, model, folder)))
                case Listen(id=number, address=address, token=token):
                    listener = socket.create_server((address, 0))
                    talk.tell(Listening(number, listener.getsockname()[1]))
                    await asyncio.to_thread(answer, listener, token)
                case Measure(id=number, address=address, port=port, token=token):
                    talk.tell(
                        Measured(number, await asyncio.to_thread(measure, address, port, token))
                    )
        except OSError as error:
            talk.tell(Unable(question.id, reason(error)))

    def _seen(self, model: str, folder: str) -> Digests | None:
        """Raises OSError."""
        path = self._folder(model, folder)
        return self._files.digests(path) if path else None

    async def _until_released_are_gone(self, rank: Rank) -> None:
        """Their memory is free then."""
        others = [one for one in self._ranks.values() if one is not rank]
        ending = [one.task for one in others if one.released.is_set()]
        if ending:
            await asyncio.wait(ending)

    def _load_here(self, take: Take) -> Load:
        """What the rank loads on this machine. Blocks. Raises Unfit, OSError."""
        options, settings = take.load.options, self._settings
        if options.trust_remote_code and take.model not in settings.trust_remote_code:
            raise Unfit("the model's own code may not run there (`trust_remote_code`)")
        self._check_addresses(take.load)
        folder = self._folder(take.model, take.load.path)
        if folder is None:
            raise Unfit("the model is not there")
        if (fault := difference(take.digests, self._files.digests(folder))) is not None:
            raise Unfit(f"its files of the model are others: {fault}")
        options = structs.replace(
            options,
            wired_limit=min(take.need, self._device.wired(settings.wired_memory)),
            disk_cache_folder=None,
            kernels_folder=str(settings.home / "kernels"),
            openblas=settings.openblas,
        )
        return structs.replace(take.load, path=str(folder), options=options)

    def _folder(self, model: str, folder: str) -> Path | None:
        """By the model's name, or where the server has it."""
        try:
            path = self._catalog.find(model).path
        except ModelNotFound:
            path = Path(folder)
        return path if path is not None and path.is_dir() else None

    def _check_addresses(self, load: Load) -> None:
        """Raises Unfit."""
        for host in load.hosts:
            for address in host.addresses if host.name == self._join.name else ():
                with socket.socket() as one:
                    try:
                        one.bind((address, 0))
                    except OSError as error:
                        raise Unfit(
                            f"{address} is no address of that machine: give the worker --address"
                        ) from error

    def _check_memory(self, rank: Rank) -> None:
        """Raises Unfit."""
        held = sum(one.need for one in self._ranks.values()) - rank.need
        if held + rank.need > self._budget:
            others = f", of which others hold {held:,}" if held else ""
            raise Unfit(
                f"a rank needs {rank.need:,} bytes of memory and models may take "
                f"{self._budget:,} there{others}"
            )

    async def _start(self, ticket: str, load: Load) -> RankProcess:
        """With a connection of its own. Raises ConnectionLost, NotTrusted, OSError."""
        connection = await self._server.connect()
        try:
            await connection.send(Ticket(ticket))
            return await RankProcess.start(connection.hand_over(), load)
        finally:
            connection.close()
