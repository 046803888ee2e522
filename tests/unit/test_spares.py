"""Machines that take the place of those that stay away or refuse. No rank runs here."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from mlx_server.engine.protocol import Load, LoadOptions
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.hosts import hub
from mlx_server.models.hosts.connection import Connection
from mlx_server.models.hosts.elsewhere import RanksElsewhere
from mlx_server.models.hosts.hub import Hub
from mlx_server.models.hosts.messages import Ended, Refused, Release, Take
from mlx_server.models.hosts.part import HostAway, Part
from tests.unit.test_hosts import joined, joining, listening, part, raw_ticket, told, until

NAMES = ("second", "third")
WAIT = 0.3
"""In place of `SPARE_SECONDS`."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SPARE_SECONDS", WAIT)


def rank(names: tuple[str, ...] = NAMES) -> Part:
    """One of two, on any of `names`."""
    return part(Load("/nowhere", LoadOptions(ranks=2)), *names)


def engine(names: tuple[str, ...] = NAMES) -> Part:
    return part(Load("/nowhere", LoadOptions()), *names)


class Machines:
    """Workers that are nothing but connections."""

    def __init__(self, made: Hub, port: int) -> None:
        self.hub = made
        self._port = port
        self._open: list[Connection] = []

    async def come(self, name: str) -> Connection:
        made = await joined(self._port, joining(name))
        await until(lambda: name in self.hub.names())
        self._open.append(made)
        return made

    async def bring(self, worker: Connection) -> Take:
        """Do what it is asked for."""
        take: Take = await told(worker, Take)
        self._open.append(await raw_ticket(self._port, take.ticket))
        return take

    def close(self) -> None:
        for one in self._open:
            one.close()


@contextlib.asynccontextmanager
async def machines(patience: float = 5.0) -> AsyncIterator[Machines]:
    async with listening(*NAMES, patience=patience) as (made, port):
        one = Machines(made, port)
        try:
            yield one
        finally:
            one.close()


def names(taken: RanksElsewhere) -> list[str]:
    return [host.name for host in taken.hosts]


async def test_a_spare_is_taken_for_one_that_stays_away() -> None:
    async with machines() as two:
        third = await two.come("third")
        taking = asyncio.create_task(two.hub.take(rank()))
        began = asyncio.get_running_loop().time()
        take = await two.bring(third)
        assert asyncio.get_running_loop().time() - began >= WAIT / 2
        assert [host.name for host in take.load.hosts] == ["", "third"]
        taken = await taking
        assert names(taken) == ["", "third"]
        taken.release()


async def test_the_first_is_waited_for_though_a_spare_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "SPARE_SECONDS", 5.0)
    async with machines() as two:
        await two.come("third")
        taking = asyncio.create_task(two.hub.take(rank()))
        await asyncio.sleep(0)
        await two.bring(await two.come("second"))
        taken = await taking
        assert names(taken) == ["", "second"]
        taken.release()


async def test_a_spare_is_taken_for_one_that_goes_before_it_begins() -> None:
    async with machines() as two:
        second, third = await two.come("second"), await two.come("third")
        taking = asyncio.create_task(two.hub.take(rank()))
        await told(second, Take)
        second.close()
        await two.bring(third)
        taken = await taking
        assert names(taken) == ["", "third"]
        taken.release()


async def test_a_spare_is_taken_at_once_for_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "SPARE_SECONDS", 60.0)
    async with machines() as two:
        second, third = await two.come("second"), await two.come("third")
        taking = asyncio.create_task(two.hub.take(rank()))
        take = await told(second, Take)
        await second.send(Refused(take.ticket, "the model is not there"))
        await two.bring(third)
        taken = await taking
        assert names(taken) == ["", "third"]
        taken.release()


async def test_a_spare_is_asked_no_less_than_others_are() -> None:
    async with machines() as two:
        third = await two.come("third")
        taking = asyncio.create_task(two.hub.take(rank()))
        take = await told(third, Take)
        await third.send(Refused(take.ticket, "the model is not there"))
        second = await two.come("second")
        take = await told(second, Take)
        await second.send(Refused(take.ticket, "it has no room"))
        with pytest.raises(ModelLoadFailed, match="host `second`: it has no room"):
            await taking


async def test_where_no_spare_is_there_either_both_are_named() -> None:
    async with machines(patience=0.1) as two:
        with pytest.raises(HostAway) as caught:
            await two.hub.take(rank())
        assert caught.value.message == (
            "host `second` is away: no worker of it has joined within 0.1 seconds, "
            "nor one of `third` in its place"
        )


async def test_who_is_there_when_patience_ends_is_taken() -> None:
    """However short that is."""
    async with machines(patience=WAIT / 3) as two:
        third = await two.come("third")
        taking = asyncio.create_task(two.hub.take(rank()))
        await two.bring(third)
        (await taking).release()


async def test_a_machine_has_one_engine_of_a_model() -> None:
    """The next waits until it is free."""
    async with machines() as two:
        third = await two.come("third")
        first = asyncio.create_task(two.hub.take(engine(("third",))))
        take = await two.bring(third)
        assert take.load.hosts == []
        held = await first
        assert names(held) == ["third"]
        another = asyncio.create_task(two.hub.take(engine()))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * WAIT):
                await asyncio.shield(another)
        held.release()
        assert (await told(third, Release)).ticket == take.ticket
        await third.send(Ended(take.ticket, 0))
        await two.bring(third)
        (await another).release()


async def test_another_model_is_another_matter() -> None:
    async with machines() as two:
        third = await two.come("third")
        wanted = engine(("third",))
        first = asyncio.create_task(two.hub.take(wanted))
        await two.bring(third)
        held = await first
        other = Part(wanted.names, 1, "other", {}, wanted.need, wanted.load)
        second = asyncio.create_task(two.hub.take(other))
        await two.bring(third)
        for taken in (held, await second):
            taken.release()
