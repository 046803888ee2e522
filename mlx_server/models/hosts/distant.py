"""A whole engine on another machine, to the front: frames come by way of its worker."""

import asyncio

from mlx_server.engine.client import EngineClient
from mlx_server.engine.spawn import Child
from mlx_server.errors import LoadCrashed, ModelLoadFailed
from mlx_server.models.hosts.elsewhere import RanksElsewhere
from mlx_server.models.hosts.host import Lease


class DistantProcess:
    """As `asyncio.subprocess.Process`, as far as one can be known from here. What it says on
    standard error is in the log of its worker.
    """

    pid = 0
    """Until it has told."""

    def __init__(self, lease: Lease, writer: asyncio.StreamWriter) -> None:
        self.stderr = asyncio.StreamReader()
        self.stderr.feed_eof()
        self._lease = lease
        self._writer = writer

    @property
    def returncode(self) -> int | None:
        """None also where nobody can know."""
        return self._lease.ended.result() if self._lease.ended.done() else None

    async def wait(self) -> int:
        await asyncio.wait([self._lease.ended])
        return self._lease.ended.result() or 0

    def send_signal(self, signal: int) -> None:
        raise ProcessLookupError

    def kill(self) -> None:
        """Its worker sees to that, at once or when it finds this machine gone."""
        self._writer.transport.abort()
        self._lease.release()


async def join(model: str, elsewhere: RanksElsewhere) -> EngineClient:
    """The engine that has been started elsewhere, once it has loaded. Raises ModelLoadFailed, which
    names its machine, and LoadCrashed.
    """
    [lease], [sock] = elsewhere.leases, [one.dup() for one in elsewhere.sockets]
    sock.setblocking(False)
    try:
        reader, writer = await asyncio.open_connection(sock=sock)
    except BaseException:
        elsewhere.release()
        raise
    finally:
        elsewhere.close_sockets()
    child = Child(DistantProcess(lease, writer), reader, writer)
    try:
        return await EngineClient.join(model, child, elsewhere)
    except LoadCrashed:
        raise
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"host `{lease.host.name}`: {error.message}") from error
