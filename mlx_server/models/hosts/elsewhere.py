"""The ranks of one engine that other machines have taken, or one that has taken all of it."""

import asyncio
import signal
import socket
from collections.abc import Sequence

from mlx_server.engine.protocol import Fabric, RankHost
from mlx_server.models.hosts.host import Lease

VERDICT_SECONDS = 1.0
"""For a host to tell how its process has ended, or to be found gone."""


class RanksElsewhere:
    """`hosts`: of all ranks, which talk over `fabric`. `sockets` lead to the processes of those
    that are elsewhere.
    """

    def __init__(
        self,
        hosts: list[RankHost],
        leases: Sequence[Lease],
        sockets: Sequence[socket.socket],
        fabric: Fabric | None = None,
    ) -> None:
        self.hosts = hosts
        self.fabric = fabric
        self.sockets = sockets
        self.leases = leases

    @property
    def lost_host(self) -> str | None:
        """A machine that is gone."""
        return next((one.host.name for one in self.leases if one.host.lost.is_set()), None)

    @property
    def killed(self) -> bool:
        """Whether a rank there was killed, perhaps for want of memory."""
        codes = [one.ended.result() for one in self.leases if one.ended.done()]
        return -signal.SIGKILL in codes

    async def until_lost(self) -> None:
        waits = [asyncio.create_task(lease.host.lost.wait()) for lease in self.leases]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def heard(self) -> None:
        """Now `lost_host` and `killed` tell why the engine has ended, if it was for a rank here."""
        ends = [lease.ended for lease in self.leases]
        await asyncio.wait(ends, timeout=VERDICT_SECONDS, return_when=asyncio.FIRST_COMPLETED)

    def close_sockets(self) -> None:
        """This process's ends, once another has them."""
        for one in self.sockets:
            one.close()

    def release(self) -> None:
        """The engine has ended."""
        for lease in self.leases:
            lease.release()
