"""What `doctor` finds out about the machines of a file of hosts."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from mlx_server.config import Settings
from mlx_server.errors import ModelLoadFailed, Unavailable, reason
from mlx_server.models.hosts.files import ModelFiles, difference
from mlx_server.models.hosts.host import Host, HostLost, Question, R, RankRefused
from mlx_server.models.hosts.hostfile import HostFile
from mlx_server.models.hosts.link import TOKEN_BYTES, Link, answer, measure
from mlx_server.models.hosts.machines import Machines
from mlx_server.models.hosts.messages import Listen, Listening, Look, Measure, Measured, Seen


class Preflight:
    """`hosts`: those that have come, by their names; `away`: why the others have not."""

    def __init__(self, settings: Settings, file: HostFile, machines: Machines) -> None:
        self.hosts: dict[str, Host] = {}
        self.away: dict[str, str] = {}
        self._file = file
        self._machines = machines
        self._files = ModelFiles(settings.home)

    async def gather(self) -> None:
        """Waits for all."""
        for machine in self._file.others:
            try:
                self.hosts[machine.ssh] = await self._machines.host(machine.ssh)
            except ModelLoadFailed as error:
                self.away[machine.ssh] = error.message

    async def difference(self, host: Host, model: str, folder: Path) -> str | None:
        """Which of the host's files of a model is not as ours, in words. Raises Unavailable."""
        ours = await asyncio.to_thread(self._files.digests, folder)
        seen = await _asked(host, lambda id_: Look(id_, model, str(folder)), Seen)
        return "the model is not there" if seen.digests is None else difference(ours, seen.digests)

    async def links(self) -> AsyncIterator[tuple[str, str, Link]]:
        """Between neighbours of the ring that are there. Raises Unavailable."""
        names = [machine.ssh for machine in self._file.machines]
        pairs = list(zip(names, [*names[1:], names[0]], strict=True))
        for one, other in pairs[: len(names) if len(names) > 2 else 1]:
            if one not in self.away and other not in self.away:
                yield one, other, await self._link(one, other)

    async def _link(self, one: str, other: str) -> Link:
        token = secrets.token_bytes(TOKEN_BYTES)
        address = next(each.ips[0] for each in self._file.machines if each.ssh == other)
        answering, port = await self._listen(other, address, token)
        try:
            if one in self.hosts:
                told = await _asked(
                    self.hosts[one], lambda id_: Measure(id_, address, port, token), Measured
                )
                return told.link
            return await asyncio.to_thread(measure, address, port, token)
        except OSError as error:
            raise Unavailable(f"`{one}` does not reach {address}: {reason(error)}") from error
        finally:
            if answering is not None:
                await asyncio.wait([answering])

    async def _listen(
        self, name: str, address: str, token: bytes
    ) -> tuple[asyncio.Task[None] | None, int]:
        """The port, and the task that answers there if that is on this machine."""
        if name in self.hosts:
            told = await _asked(
                self.hosts[name], lambda id_: Listen(id_, address, token), Listening
            )
            return None, told.port
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        return asyncio.create_task(asyncio.to_thread(answer, listener, token)), port


async def _asked(host: Host, question: Callable[[int], Question], kind: type[R]) -> R:
    """Raises Unavailable."""
    try:
        return await host.ask(question, kind)
    except HostLost as error:
        raise Unavailable(f"host `{host.name}` has gone") from error
    except RankRefused as error:
        raise Unavailable(f"host `{host.name}`: {error}") from error
