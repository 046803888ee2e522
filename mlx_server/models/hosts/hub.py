"""Where workers on other machines join the server, and are asked to take ranks."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Sequence

import msgspec

from mlx_server.engine.protocol import Device, Fabric, RankHost
from mlx_server.errors import reason
from mlx_server.events import event
from mlx_server.models.hosts.connection import Connection, ConnectionLost
from mlx_server.models.hosts.elsewhere import RanksElsewhere
from mlx_server.models.hosts.host import Host, HostLost, Lease, RankRefused
from mlx_server.models.hosts.hostfile import NoDevice
from mlx_server.models.hosts.messages import (
    MAX_OPENING,
    Dismissed,
    Join,
    Purpose,
    decode_purpose,
)
from mlx_server.models.hosts.opening import OPENING_SECONDS, NotTrusted, admit
from mlx_server.models.hosts.part import SPARE_SECONDS, Part, Search

MOST_OPENINGS = 32
"""Connections that have not shown yet that they know the secret."""
BACKLOG = 128

log = logging.getLogger("mlx_server.hosts")


class Hub:
    """`names`: of the machines that may join. `own_addresses`: of this one, for MLX's ring; if
    none, the one that workers see. `patience`: seconds that a machine may be away. `fabric`: what
    this machine and others talk over, as HostFile.fabric says.
    """

    def __init__(
        self,
        names: Collection[str],
        secret: bytes,
        versions: dict[str, str],
        patience: float,
        own_addresses: Sequence[str] = (),
        fabric: Callable[[Sequence[str]], Fabric | None] = lambda names: None,
    ) -> None:
        self.troubles: dict[str, str] = {}
        """Why a machine is not there, as far as somebody knows."""
        self._names = frozenset(names)
        self._secret = secret
        self._versions = versions
        self._patience = patience
        self._own_addresses = list(own_addresses)
        self._fabric = fabric
        self._device: Device | None = None
        self._hosts: dict[str, Host] = {}
        self._unfit: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._openings = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, listener: socket.socket, device: Device) -> None:
        """`device` is this machine's."""
        self._device = device
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._own(asyncio.create_task(self._accept(listener), name="hosts"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def names(self) -> list[str]:
        """Of the machines that are there."""
        return [name for name, host in self._hosts.items() if not host.lost.is_set()]

    async def take(self, part: Part) -> RanksElsewhere:
        """Have machines take their part of a model, waiting for those that are away. Raises
        HostAway, HostRefuses, which name the machine.
        """
        now = asyncio.get_running_loop().time()
        search = Search(part.names, part.count, now + min(SPARE_SECONDS, self._patience))
        deadline = now + self._patience
        while True:
            hosts = await self._found(search, deadline, part.model)
            try:
                taken = await self._taken(part, hosts)
            except HostLost:
                continue
            except RankRefused as error:
                why = str(error)
                log.warning(
                    event("host_passed_over", model=part.model, host=error.host, reason=why)
                )
                search.pass_over(error.host, why)
            else:
                _tell(part, hosts)
                return taken

    async def present(self, name: str) -> Host:
        """Waits for it. Raises ModelLoadFailed, which names it and tells why it cannot be had."""
        now = asyncio.get_running_loop().time()
        [host] = await self._found(Search([name], 1, now), now + self._patience)
        return host

    async def news(self) -> None:
        """Until a machine comes, or has let go of a part of a model."""
        await self._changed.wait()

    async def _found(self, search: Search, deadline: float, model: str = "") -> list[Host]:
        """Machines that are there and have no part of `model`. Raises HostAway, HostRefuses."""
        loop = asyncio.get_running_loop()
        while True:
            hosts = {name: self._hosts[name] for name in self.names()}
            there = {name: host for name, host in hosts.items() if not host.has_part_of(model)}
            now = loop.time()
            if (found := search.found(there, self._unfit, now)) is not None:
                return found
            if now >= deadline:
                raise search.away(there, self._unfit, self.troubles, self._patience)
            until = min(deadline, search.spares_at) if now < search.spares_at else deadline
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self.news()

    async def _taken(self, part: Part, hosts: Sequence[Host]) -> RanksElsewhere:
        """Raises HostLost, RankRefused."""
        load, fabric = part.load, None
        if part.is_rank:
            ranks, fabric = self._rank_hosts(hosts), self._fabric_of(hosts)
            load = msgspec.structs.replace(load, hosts=ranks)
        else:
            ranks = [RankHost(host.name, host.addresses) for host in hosts]
        leases = [host.lease(part.model, part.digests, part.need, load) for host in hosts]
        return RanksElsewhere(ranks, leases, await _connections(leases), fabric)

    def _rank_hosts(self, hosts: Sequence[Host]) -> list[RankHost]:
        """Raises RankRefused."""
        # Only the last rank connects to the first.
        own = self._own_addresses or [hosts[-1].seen_from]
        for host in hosts:
            if (count := len(host.addresses)) != len(own):
                raise RankRefused(
                    host.name,
                    f"it has {count} addresses for the ring and this machine {len(own)}",
                )
        return [RankHost("", own), *(RankHost(host.name, host.addresses) for host in hosts)]

    def _fabric_of(self, hosts: Sequence[Host]) -> Fabric | None:
        """Raises RankRefused."""
        try:
            return self._fabric([host.name for host in hosts])
        except NoDevice as error:
            raise RankRefused(error.host, str(error)) from error

    # who comes

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:  # of the connection, or for want of files
                    log.warning(event("worker_not_accepted", reason=reason(error)))
                    await asyncio.sleep(1)
                    continue
                if self._openings >= MOST_OPENINGS:
                    sock.close()
                else:
                    self._own(asyncio.create_task(self._receive(sock)))

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock)
        except OSError:  # it has gone
            sock.close()
            return
        lease = None
        try:
            purpose = await self._admitted(connection)
            if isinstance(purpose, Join):
                await self._welcome(connection, purpose)
            elif purpose is not None and (lease := self._lease(purpose.ticket)) is not None:
                lease.connection.set_result(connection.hand_over())
        except ConnectionLost as error:
            log.info(event("worker_gone", peer=connection.peer, reason=error))
        finally:
            if lease is None:
                connection.close()

    async def _admitted(self, connection: Connection) -> Purpose | None:
        """What it wants, if it knows the secret. Raises ConnectionLost."""
        self._openings += 1
        try:
            async with asyncio.timeout(OPENING_SECONDS):
                await admit(connection, self._secret)
                purpose: Purpose = decode_purpose(await connection.receive(MAX_OPENING))
                return purpose
        except (NotTrusted, TimeoutError, msgspec.MsgspecError) as error:
            why = str(error) or "nothing was said"
            log.warning(event("worker_refused", peer=connection.peer, reason=why))
            return None
        finally:
            self._openings -= 1

    def _lease(self, ticket: str) -> Lease | None:
        found = (host.expects(ticket) for host in self._hosts.values())
        return next((lease for lease in found if lease is not None), None)

    async def _welcome(self, connection: Connection, join: Join) -> None:
        name = join.name
        if (why := self._fault(join)) is not None:
            log.warning(event("worker_refused", host=name, peer=connection.peer, reason=why))
            if name in self._names:
                self._note(name, why)
            await connection.send(Dismissed(why))
            return
        if (former := self._hosts.get(name)) is not None:
            await former.dismiss(f"another worker has joined as `{name}`")
        host = Host(connection, join, self._notify)
        self._hosts[name] = host
        self._note(name, None)
        log.info(event("worker_joined", host=name, peer=connection.peer, budget=join.budget))
        try:
            why = await host.run()
            log.warning(event("worker_lost", host=name, reason=why))
        finally:
            if self._hosts.get(name) is host:
                del self._hosts[name]

    def _note(self, name: str, unfit: str | None) -> None:
        """Why a machine that has come cannot be used; None for one that can."""
        self._unfit.pop(name, None)
        if unfit is not None:
            self._unfit[name] = unfit
        self._notify()

    def _notify(self) -> None:
        """Wake those who look for machines."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _fault(self, join: Join) -> str | None:
        """Why a worker is of no use here."""
        if join.name not in self._names:
            return f"the server has no use for a worker called `{join.name}`"
        for name, ours in self._versions.items():
            if (theirs := join.versions.get(name, "missing")) != ours:
                return f"it has {name} {theirs} and the server {ours}"
        assert self._device is not None
        if join.device.name != self._device.name:
            return f"its device is {join.device.name} and the server's {self._device.name}"
        return None


def _tell(part: Part, hosts: Sequence[Host]) -> None:
    names = [host.name for host in hosts]
    kind = "ranks_taken" if part.is_rank else "engine_taken"
    log.info(event(kind, model=part.model, hosts=", ".join(names)))
    first = part.names[: part.count]
    spares = [name for name in names if name not in first]
    replaced = [name for name in first if name not in names]
    for spare, name in zip(spares, replaced, strict=True):
        log.warning(event("spare_taken", model=part.model, host=spare, instead_of=name))


async def _connections(leases: Sequence[Lease]) -> list[socket.socket]:
    """Of all, or of none. Raises HostLost, RankRefused."""
    waits = [lease.connection for lease in leases]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_EXCEPTION)
        for one in done:
            one.result()
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    return [wait.result() for wait in waits]
