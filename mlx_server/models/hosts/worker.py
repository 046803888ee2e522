"""The worker on another machine: joins a server, and takes ranks and replicas of its models.

It trusts the server to say what is computed, and decides itself where: its own folders, limits and
libraries, and whether a model's own code may run.
"""

import asyncio
import logging
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from mlx_server.config import Settings
from mlx_server.engine.protocol import Device, Load
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
from mlx_server.models.hosts.processes import Running, start, until_over
from mlx_server.models.hosts.versions import own_versions
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.sources import ModelSources

MIN_DELAY, MAX_DELAY = 0.5, 10.0
"""Seconds between attempts to join; doubles."""

log = logging.getLogger("mlx_server.hosts")


class Unfit(Exception):
    """What was asked for cannot be done here. The message is for people."""


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
class Held:
    """A rank or an engine that the server has asked for, or does not need any more."""

    need: int
    task: asyncio.Task[None]
    released: asyncio.Event = field(default_factory=asyncio.Event)


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
        self._held: dict[str, Held] = {}
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
        """Until the server has gone; returns why. Nothing outlives it. Raises Unavailable."""
        talk = Talk(connection)
        try:
            await connection.send(self._join)
            log.info(event("joined", server=self._server, host=self._join.name))
            await talk.run(lambda body: self._take(talk, decode_from_server(body)))
        except ConnectionLost as error:
            return str(error)
        finally:
            tasks = [*(one.task for one in self._held.values()), *self._replies]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise AssertionError("talk ends with an error")

    def _take(self, talk: Talk, message: FromServer) -> None:
        match message:
            case Take(ticket=ticket, need=need):
                task = asyncio.create_task(self._hold(talk, message), name=f"part {ticket}")
                self._held[ticket] = Held(need, task)
                task.add_done_callback(lambda _: self._held.pop(ticket))
            case Release(ticket=ticket) if ticket in self._held:
                self._held[ticket].released.set()
            case Look() | Listen() | Measure():
                task = asyncio.create_task(self._reply(talk, message))
                self._replies.add(task)
                task.add_done_callback(self._replies.discard)
            case Dismissed(reason=why):
                raise Unavailable(f"the server at {self._server} refuses: {why}")

    async def _hold(self, talk: Talk, take: Take) -> None:
        """From its being asked for to its end."""
        own = self._held[take.ticket]
        kind = "rank" if take.load.hosts else "engine"
        try:
            await self._until_released_are_gone(own)
            load = await asyncio.to_thread(self._load_here, take)
            self._check_memory(own)
            running = await self._start(take, load)
        except (Unfit, ConnectionLost, OSError, NotTrusted) as error:
            log.warning(event(f"{kind}_refused", model=take.model, reason=reason(error)))
            talk.tell(Refused(take.ticket, reason(error)))
            return
        pid = running.pid
        log.info(event(f"{kind}_started", model=take.model, pid=pid, bytes=take.need))
        try:
            await until_over(running, own.released)
        finally:
            code = await running.end()
            log.info(event(f"{kind}_ended", model=take.model, pid=pid, code=code))
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

    async def _until_released_are_gone(self, own: Held) -> None:
        """Their memory is free then."""
        others = [one for one in self._held.values() if one is not own]
        ending = [one.task for one in others if one.released.is_set()]
        if ending:
            await asyncio.wait(ending)

    def _load_here(self, take: Take) -> Load:
        """What is loaded on this machine. Blocks. Raises Unfit, OSError."""
        options, settings = take.load.options, self._settings
        if options.dequantize in ("packed", "both") and not self._device.packs:
            raise Unfit("its processor multiplies by no quantized weights, as the server's does")
        if options.trust_remote_code and take.model not in settings.trust_remote_code:
            raise Unfit("the model's own code may not run there (`trust_remote_code`)")
        self._check_addresses(take.load)
        folder, adapter = self._folder(take.model, take.load.path), None
        if folder is None:
            raise Unfit("the model is not there")
        if take.load.adapter_path is not None:
            adapter = self._adapter(take.model, take.load.adapter_path)
        if (fault := difference(take.digests, self._files.digests(folder, adapter))) is not None:
            raise Unfit(f"its files of the model are others: {fault}")
        own = settings.load_options(take.model)
        options = structs.replace(
            options,
            wired_limit=min(take.need, self._device.wired(settings.wired_memory)),
            disk_cache_folder=own.disk_cache_folder,
            disk_cache_limit=own.disk_cache_limit,
            disk_cache_daily=own.disk_cache_daily,
            kernels_folder=own.kernels_folder,
            openblas=own.openblas,
        )
        return structs.replace(
            take.load,
            path=str(folder),
            adapter_path=str(adapter) if adapter else None,
            options=options,
        )

    def _folder(self, model: str, folder: str) -> Path | None:
        """By the model's name, or where the server has it."""
        try:
            path = self._catalog.find(model).path
        except ModelNotFound:
            path = Path(folder)
        return path if path is not None and path.is_dir() else None

    def _adapter(self, model: str, folder: str) -> Path:
        """Found in the same way. Raises Unfit."""
        try:
            path = self._catalog.find(model).adapter_path
        except ModelNotFound:
            path = Path(folder)
        if path is None or not path.is_dir():
            raise Unfit("the adapter is not there")
        return path

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

    def _check_memory(self, own: Held) -> None:
        """Raises Unfit."""
        held = sum(one.need for one in self._held.values()) - own.need
        if held + own.need > self._budget:
            others = f", of which others hold {held:,}" if held else ""
            raise Unfit(
                f"its part of the model needs {own.need:,} bytes of memory and models may take "
                f"{self._budget:,} there{others}"
            )

    async def _start(self, take: Take, load: Load) -> Running:
        """With a connection of its own. Raises ConnectionLost, NotTrusted, OSError."""
        connection = await self._server.connect()
        try:
            await connection.send(Ticket(take.ticket))
            return await start(connection.hand_over(), take.model, load)
        finally:
            connection.close()
