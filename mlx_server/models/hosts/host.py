"""Another machine to the server, once its worker has joined."""

import asyncio
import contextlib
import itertools
import secrets
import socket
from collections.abc import Callable
from typing import TypeVar

from mlx_server.engine.protocol import Load
from mlx_server.models.hosts.connection import Connection, ConnectionLost, Talk
from mlx_server.models.hosts.messages import (
    Digests,
    Dismissed,
    Ended,
    Join,
    Listen,
    Listening,
    Look,
    Measure,
    Measured,
    Refused,
    Release,
    Reply,
    Seen,
    Take,
    Unable,
    decode_from_worker,
)

Question = Look | Listen | Measure
R = TypeVar("R", Seen, Listening, Measured)


class HostLost(Exception):
    """The worker has gone, or its machine, or the network between."""


class RankRefused(Exception):
    """The worker of `host` does not do what it was asked. The message is for people."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(why)
        self.host = host


class Lease:
    """A part of `model`, a rank or an engine, that a host has been asked to take."""

    def __init__(self, host: "Host", model: str) -> None:
        loop = asyncio.get_running_loop()
        self.host = host
        self.model = model
        self.released = False
        self.ticket = secrets.token_hex(16)
        self.connection: asyncio.Future[socket.socket] = loop.create_future()
        """To its process. Raises RankRefused, HostLost."""
        self.ended: asyncio.Future[int | None] = loop.create_future()
        """Its exit code; None where nobody can know."""
        # Nobody may ask any more.
        self.connection.add_done_callback(lambda done: done.cancelled() or done.exception())

    def fail(self, error: Exception) -> None:
        if not self.connection.done():
            self.connection.set_exception(error)

    def end(self, code: int | None) -> None:
        why = "its process ended at once"
        self.fail(HostLost() if code is None else RankRefused(self.host.name, why))
        if not self.ended.done():
            self.ended.set_result(code)

    def release(self) -> None:
        """Nobody needs it any more."""
        again, self.released = self.released, True
        taken = not self.connection.cancel() and self.connection.exception() is None
        if not self.ended.done():
            self.host.tell(Release(self.ticket))
        if taken and not again:
            self.connection.result().close()
            self.host.on_release()


class Host:
    """`lost` is set when it has gone. `on_release` is called when it need not do its part of a
    model any more.
    """

    def __init__(
        self, connection: Connection, join: Join, on_release: Callable[[], None] = lambda: None
    ) -> None:
        self.name = join.name
        self.on_release = on_release
        self.budget = join.budget
        self.addresses = join.addresses or [connection.peer]
        self.seen_from = connection.own
        """This machine's address to it."""
        self.lost = asyncio.Event()
        self._connection = connection
        self._talk = Talk(connection)
        self._leases: dict[str, Lease] = {}
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Reply]] = {}

    async def run(self) -> str:
        """Until it has gone; returns why."""
        try:
            await self._talk.run(self._take)
        except ConnectionLost as error:
            return str(error)
        finally:
            self.lost.set()
            for lease in self._leases.values():
                lease.end(None)
            for reply in self._asked.values():
                if not reply.done():
                    reply.set_exception(HostLost())
        return "stopped"

    def tell(self, message: Release) -> None:
        self._talk.tell(message)

    async def ask(self, question: Callable[[int], Question], kind: type[R]) -> R:
        """The reply to what `question` makes of its id. Raises HostLost, RankRefused."""
        number = next(self._numbers)
        reply = asyncio.get_running_loop().create_future()
        if self.lost.is_set():
            raise HostLost
        self._asked[number] = reply
        self._talk.tell(question(number))
        try:
            answer = await reply
        finally:
            del self._asked[number]
        if isinstance(answer, Unable):
            raise RankRefused(self.name, answer.reason)
        assert isinstance(answer, kind)
        return answer

    async def dismiss(self, why: str) -> None:
        """It need not come again."""
        with contextlib.suppress(ConnectionLost):
            await self._connection.send(Dismissed(why))
        self._connection.cut()

    def lease(self, model: str, digests: Digests, need: int, load: Load) -> Lease:
        """Ask it to take a rank, or an engine if `load` has no hosts."""
        lease = Lease(self, model)
        if self.lost.is_set():
            lease.end(None)
            return lease
        self._leases[lease.ticket] = lease
        self._talk.tell(Take(lease.ticket, model, digests, need, load))
        return lease

    def has_part_of(self, model: str) -> bool:
        return any(one.model == model and not one.released for one in self._leases.values())

    def expects(self, ticket: str) -> Lease | None:
        """The part that may have a connection."""
        lease = self._leases.get(ticket)
        return lease if lease is not None and not lease.connection.done() else None

    def _take(self, body: bytes) -> None:
        match decode_from_worker(body):
            case Refused(ticket=ticket, reason=why) if ticket in self._leases:
                lease = self._leases.pop(ticket)
                lease.fail(RankRefused(self.name, why))
                lease.end(0)
            case Ended(ticket=ticket, code=code) if ticket in self._leases:
                self._leases.pop(ticket).end(code)
            case Seen() | Listening() | Measured() | Unable() as reply:
                if (asked := self._asked.get(reply.id)) is not None and not asked.done():
                    asked.set_result(reply)
