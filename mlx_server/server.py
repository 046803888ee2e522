"""The HTTP server: start and stop."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

import psutil
import uvicorn
from fastapi import FastAPI

from mlx_server.api.http.connection import SPARE_CONNECTIONS, Connection, ConnectionLimits
from mlx_server.api.http.stopping import Stopping
from mlx_server.api.reloading import Reloader
from mlx_server.errors import ModelLoadFailed
from mlx_server.events import event
from mlx_server.models.pool.manager import ModelPoolManager

KEEP_ALIVE_SECONDS = 20
"""More than the 5 s of Python's clients: the side that sends should close the connection."""
FINAL_EVENT_SECONDS = 0.5
"""To send the error that ends a stream after the grace period."""
CUT_OFF_SECONDS = 1
OTHER_FILES = 256
"""Besides connections: libraries, engines, models being read."""
OPEN_MAX = 10240
"""Open files that macOS permits a process, even where it states no hard limit."""

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which stops in three steps: on SIGINT or SIGTERM new requests get a 503 and
    running ones have `grace` seconds before they end with an error; then connections close; then
    engines end. A second signal kills everything, with exit code 128 plus its number. It stops by
    itself when all models named at the start fail to load. `greet` runs from when it listens, for
    no longer than it does.
    """

    def __init__(
        self,
        application: FastAPI,
        limits: ConnectionLimits,
        grace: float,
        greet: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__(_config(application, limits))
        self._application = application
        self._grace = grace
        self._greet = greet
        self._greeting: asyncio.Task[None] | None = None
        self._stopping: Stopping = application.state.stopping
        self._starting: asyncio.Task[Any] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._reloading: set[asyncio.Task[None]] = set()
        self._failure: str | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises what keeps the application from starting, and ModelLoadFailed."""
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.current_task()
        with self.capture_signals():
            try:
                async with self._application.router.lifespan_context(self._application):
                    self._starting = None
                    await super().serve(sockets)
            except asyncio.CancelledError:
                if not self.should_exit:
                    raise
        if self._failure is not None:
            raise ModelLoadFailed(self._failure)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._greeting = asyncio.create_task(self._show_greeting())
            self._watching = asyncio.create_task(self._watch_models())
            if sys.platform != "win32":
                self._loop.add_signal_handler(signal.SIGHUP, self._reload)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(*self._reloading)
        if self._greeting is not None:
            self._greeting.cancel()
            await asyncio.wait([self._greeting])
        deadline = self._loop.time() + self._grace + FINAL_EVENT_SECONDS
        while self.server_state.tasks and self._loop.time() < deadline:
            await asyncio.wait(self.server_state.tasks, timeout=deadline - self._loop.time())
        await super().shutdown(sockets)

    async def _show_greeting(self) -> None:
        try:
            await self._greet()
        except OSError as error:
            # Whoever read what we print has gone; requests come another way.
            log.warning(event("greeting_failed", error=error))

    async def _watch_models(self) -> None:
        pool: ModelPoolManager = self._application.state.pool
        self._failure = await pool.start_failure()
        if self._failure is not None:
            self.should_exit = True
            self._begin_stopping()

    def _reload(self) -> None:
        reloader: Reloader = self._application.state.reloader
        task = asyncio.create_task(reloader.reload_or_log())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between any two instructions."""
        if self.should_exit:
            _kill_everything(sig)
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._begin_stopping)

    def _begin_stopping(self) -> None:
        log.info(event("stopping", grace=self._grace, requests=len(self.server_state.tasks)))
        self._stopping.begin()
        if self._starting is not None:
            self._starting.cancel()


def _config(application: FastAPI, limits: ConnectionLimits) -> uvicorn.Config:
    protocol = partial(Connection, limits=limits, wires=application.state.wires)
    return uvicorn.Config(
        application,
        # uvloop if installed
        loop="auto",
        http=cast(type[asyncio.Protocol], protocol),
        ws="none",
        # `Server.serve` runs it, so that its errors are raised.
        lifespan="off",
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CUT_OFF_SECONDS,
    )


def _kill_everything(number: int) -> NoReturn:
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


def raise_open_file_limit(max_connections: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    wanted = max_connections + SPARE_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = _raise_open_files(soft, hard, wanted)
    if possible < wanted:
        log.warning(event("open_files_limited", wanted=wanted, possible=possible))


def _raise_open_files(soft: int, hard: int, wanted: int) -> int:
    """Returns the limit that was reached."""
    import resource

    highest = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    for limit in (highest, min(highest, OPEN_MAX)):
        if limit > soft:
            with contextlib.suppress(ValueError, OSError):  # more than the system permits
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return limit
    return soft
