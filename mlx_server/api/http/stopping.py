"""Graceful shutdown."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mlx_server.errors import Unavailable

RETRY_SECONDS = 5.0


class ServerStopping(Unavailable):
    code = "server_stopping"

    def __init__(self) -> None:
        super().__init__("The server is stopping.", retry_after=RETRY_SECONDS)


class Stopping:
    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._since: float | None = None
        self._limits: dict[asyncio.Timeout, float] = {}

    @property
    def begun(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        if self._since is None:
            self._since = asyncio.get_running_loop().time()
            for limit, grace in self._limits.items():
                limit.reschedule(self._since + grace)

    @asynccontextmanager
    async def limited(self, grace: float | None = None) -> AsyncIterator[None]:
        """Work that a stopping server waits for: `grace` seconds, or the default; then it is
        cancelled and ServerStopping raised.
        """
        allowed = self._grace if grace is None else grace
        try:
            async with asyncio.timeout_at(self._deadline(allowed)) as limit:
                self._limits[limit] = allowed
                try:
                    yield
                finally:
                    del self._limits[limit]
        except TimeoutError:
            if not limit.expired():
                raise
            raise ServerStopping from None

    def _deadline(self, grace: float) -> float | None:
        return None if self._since is None else self._since + grace
