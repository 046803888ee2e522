"""Replaces a model's engine when it ends or hangs."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Stats
from mlx_server.errors import LoadCrashed, Unavailable
from mlx_server.events import event
from mlx_server.models.pool.blame import CRASH, KILL, LOSS
from mlx_server.models.pool.replica import Replica

MAX_LOAD_ATTEMPTS = 3
MIN_DELAY, MAX_DELAY = 0.25, 30.0
"""Seconds between loads after engines that gave nothing; doubles."""
HANG_TURNS = 20
"""In longest turns without progress."""
HANG_CHECKS = 10
"""Consecutive silent checks that mean a hang. Seconds would count a suspended front's time."""
KV_SHARE_AFTER_KILL = 0.5
"""After SIGKILL, the system's answer to lack of memory. The share grows again."""

StartProcess = Callable[[float], Awaitable[EngineClient]]
"""Given a share of its KV memory."""

log = logging.getLogger("mlx_server.supervisor")


class EngineSupervisor:
    """Keeps a process behind `engine`, the first being `process`, or one that it starts, rather on
    the machine `host`. Run `run` in a task; cancel it before `stop`.
    """

    def __init__(
        self,
        process: EngineClient | None,
        engine: Replica,
        start: StartProcess,
        hang_timeout: float,
        host: str = "",
    ) -> None:
        self.restarts = 0
        self.last_lines: tuple[str, ...] = ()
        self._process = process
        self._engine = engine
        self._start = start
        self._hang_timeout = hang_timeout
        self._running = process is not None
        self._fruitless = 0
        self._host = host
        if process is not None:
            engine.attach(process)

    @property
    def restarting(self) -> bool:
        return not self._running

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._running else None

    @property
    def host(self) -> str:
        """Where it is or, while it is not there, where it is rather to be; empty: here."""
        return self._process.host if self._process and self._running else self._host

    @property
    def stats(self) -> Stats | None:
        return self._process.stats if self._process and self._running else None

    async def run(self, wanted: Callable[[], bool]) -> None:
        """Replace each process that ends while `wanted`. Raises as loads do."""
        process = self._process or self._use(await self._load(1.0))
        while True:
            hung = await self._closed_or_hung(process)
            ended_at = time.monotonic()
            kv_share = await self._bury(process, hung)
            if not wanted():
                return
            process = await self._load(kv_share)
            self.restarts += 1
            log.warning(
                event(
                    "engine_restarted",
                    model=self._engine.model_id,
                    pid=process.pid,
                    host=process.host or None,
                    seconds=time.monotonic() - ended_at,
                    requests=self._engine.in_flight,
                )
            )
            self._use(process)

    async def stop(self) -> None:
        self._engine.fail(Unavailable(f"The model `{self._engine.model_id}` is being stopped."))
        if self._process is not None:
            await self._process.stop()

    def _use(self, process: EngineClient) -> EngineClient:
        self._process = process
        self._running = True
        self._engine.attach(process)
        return process

    async def _closed_or_hung(self, process: EngineClient) -> bool:
        silent = 0
        while silent <= HANG_CHECKS:
            reads = process.reads
            try:
                async with asyncio.timeout(self._patience() / HANG_CHECKS):
                    await process.closed.wait()
                    return False
            except TimeoutError:
                silent = silent + 1 if process.in_flight and process.reads == reads else 0
        model, seconds = self._engine.model_id, self._patience()
        log.error(event("engine_hung", model=model, pid=process.pid, seconds=seconds))
        return True

    def _patience(self) -> float:
        """Seconds a busy engine may be silent."""
        longest = self.stats.longest_turn if self.stats is not None else 0.0
        return max(self._hang_timeout, HANG_TURNS * longest)

    async def _bury(self, process: EngineClient, hung: bool) -> float:
        """Take the requests back; returns the next KV share."""
        engine = self._engine
        self._running = False
        if hung:
            await process.tell_stacks()
        await process.kill()
        self.last_lines = tuple(process.last_lines)
        log.error(
            event(
                "engine_ended",
                model=engine.model_id,
                pid=process.pid,
                how=process.how_it_ended,
                lost_host=process.lost_host,
                requests=engine.in_flight,
            )
        )
        self._fruitless = 0 if engine.progressed else self._fruitless + 1
        if process.lost_host is not None:
            engine.detach(LOSS)
            return 1.0
        killed = process.killed and not hung
        engine.detach(KILL if killed else CRASH)
        return KV_SHARE_AFTER_KILL if killed else 1.0

    async def _load(self, kv_share: float) -> EngineClient:
        attempt = 0
        while True:
            await asyncio.sleep(_delay(self._fruitless + attempt))
            try:
                return await self._start(kv_share)
            except LoadCrashed as error:
                model = self._engine.model_id
                log.error(event("engine_load_crashed", model=model, reason=error.message))
                self.last_lines = error.last_lines
                attempt += 1
                if attempt == MAX_LOAD_ATTEMPTS:
                    raise


def _delay(failures: int) -> float:
    if failures == 0:
        return 0.0
    return min(MAX_DELAY, MIN_DELAY * 2.0 ** min(failures - 1, 16))
