"""The process that makes the web page, started when somebody first asks for it."""

import asyncio
import contextlib
import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mlx_server.engine.spawn import Child, next_line, spawn
from mlx_server.errors import Unavailable
from mlx_server.events import event

if TYPE_CHECKING:
    import httpx2

START_SECONDS = 60.0
PASS_SECONDS = 60.0
"""More than a long poll takes."""

log = logging.getLogger("mlx_server.page")


def installed() -> bool:
    """Whether the extra `ui` is."""
    return importlib.util.find_spec("nicegui") is not None


class PageProcess:
    """Listens on a socket in a folder that only this user can enter, so that what the page says,
    keys among it, passes no other process.
    """

    def __init__(self) -> None:
        self._child: Child | None = None
        self._folder: Path | None = None
        self._starting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._client: httpx2.AsyncClient | None = None

    async def socket(self, server: str) -> Path:
        """Where it listens; `server` is the URL by which it calls this one. Raises Unavailable."""
        async with self._starting:
            if self._child is None:
                await self._start(server)
            assert self._folder is not None
            return self._folder / "page"

    def client(self, path: Path) -> "httpx2.AsyncClient":
        """For requests to what listens at `path`."""
        import httpx2

        if self._client is None:
            self._client = httpx2.AsyncClient(
                transport=httpx2.AsyncHTTPTransport(uds=str(path)), timeout=PASS_SECONDS
            )
        return self._client

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.kill()
        await asyncio.gather(*self._tasks)

    async def _start(self, server: str) -> None:
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="mlx-server-"))
        child = await spawn("mlx_server.ui")
        self._folder, self._child = folder, child
        assert child.process.stderr is not None
        began = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(_relay_log(child.process.stderr)),
            asyncio.create_task(self._watch(child, folder, began)),
        ]
        start = {"socket": str(folder / "page"), "server": server}
        child.writer.write(msgspec.json.encode(start) + b"\n")
        try:
            async with asyncio.timeout(START_SECONDS):
                listening = await began
        except TimeoutError:
            listening = False
        if not listening:
            await self.stop()
            raise Unavailable("The web page's process did not start; its log says why.")

    async def _watch(self, child: Child, folder: Path, began: "asyncio.Future[bool]") -> None:
        """It says a line once it listens; its socket closes when it ends."""
        with contextlib.suppress(ConnectionError):
            while await child.reader.readline():
                began.set_result(True)  # once
        if not began.done():
            began.set_result(False)
        self._child = None
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        await child.kill()
        log.info(event("page_ended", status=child.process.returncode))
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _relay_log(stderr: asyncio.StreamReader) -> None:
    while line := await next_line(stderr):
        log.info(event("page_log", line=line.decode(errors="replace").rstrip()))
