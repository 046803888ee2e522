"""Downloads under way in this server: one for each model, shared by everybody who asks for it.

The fetching itself is `models.download`. Here a pull gets its thread, its listeners and its end.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mlx_server.config import Settings
from mlx_server.errors import ServerError, Unavailable
from mlx_server.events import event
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.hub import Progress, pull, pull_target

AT_ONCE = 4
"""Downloads that run at a time; more wait for their turn."""
KEPT_FAILURES = 32
STOP_SECONDS = 5.0

log = logging.getLogger("mlx_server.pulls")


@dataclass(frozen=True, slots=True)
class PullStatus:
    """A download that runs (`error` None) or that has failed."""

    model: str
    progress: Progress
    error: str | None = None


class PullManager:
    """Runs downloads in threads. A pull goes on for as long as anybody follows it."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._pulls: dict[str, _Pull] = {}
        self._failures: dict[str, PullStatus] = {}
        self._stopping = False
        # Of their own: the loop's threads are for short work, such as tokenizing.
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pull")

    def statuses(self) -> list[PullStatus]:
        """The downloads under way, and the last ones that failed, one for each model."""
        running = {name: PullStatus(name, one.progress) for name, one in self._pulls.items()}
        return list((self._failures | running).values())

    @asynccontextmanager
    async def follow(self, model_id: str) -> AsyncIterator[AsyncIterator[Progress]]:
        """Pull a model, or join the pull under way; yields what there is to tell about it.

        The iterator skips what a slow reader missed, ends when the model is there and raises what
        went wrong. The pull is cancelled when the last block is left before that.
        """
        target = pull_target(model_id, self._settings)
        one = await self._joined(target)
        one.listeners += 1
        try:
            yield one.news()
        finally:
            one.listeners -= 1
            if one.listeners == 0:
                one.cancel()

    async def stop(self) -> None:
        """Cancel every download; what has arrived stays for the next one."""
        self._stopping = True
        tasks = [one.task for one in self._pulls.values()]
        for one in self._pulls.values():
            one.cancel()
        if tasks:
            # A thread ends with its next piece of news; a silent one is not waited for longer.
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _joined(self, target: str) -> "_Pull":
        """The pull of `target`, begun unless it is under way."""
        while (one := self._pulls.get(target)) is not None and one.cancelled:
            await asyncio.wait([one.task])
        if self._stopping:
            raise Unavailable("The server is stopping.", retry_after=1)
        if one is None:
            one = self._pulls[target] = _Pull(target, self._settings, self._threads)
            one.task.add_done_callback(lambda _: self._ended(target))
            self._failures.pop(target, None)
        return one

    def _ended(self, target: str) -> None:
        one = self._pulls.pop(target)
        self._catalog.refresh()
        if one.cancelled or one.error is None:
            return
        message = one.error.message if isinstance(one.error, ServerError) else "internal error"
        self._failures[target] = PullStatus(target, one.progress, message)
        while len(self._failures) > KEPT_FAILURES:
            self._failures.pop(next(iter(self._failures)))


class _Pull:
    """One download: its thread, and what it said last."""

    def __init__(self, target: str, settings: Settings, threads: ThreadPoolExecutor) -> None:
        self.listeners = 0
        self.progress = Progress("Starting")
        self.error: Exception | None = None
        self._target = target
        self._settings = settings
        self._threads = threads
        self._cancelled = threading.Event()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.create_task(self._run(), name=f"pull {target}")

    @property
    def cancelled(self) -> bool:
        """Whether it was given up; its thread may take a moment to notice."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    async def news(self) -> AsyncIterator[Progress]:
        """What it says last, whenever that has changed. Raises what it failed with."""
        while not self.task.done():
            changed = self._changed
            yield self.progress
            await changed.wait()
        if self.error is not None:
            raise self.error
        yield self.progress

    async def _run(self) -> None:
        log.info(event("pull_started", model=self._target))
        try:
            await self._loop.run_in_executor(
                self._threads, pull, self._target, self._settings, self._report
            )
        except _Abandoned:
            self.error = Unavailable(f"The pull of {self._target} was cancelled.")
            log.info(event("pull_cancelled", model=self._target, bytes=self.progress.done))
        except Exception as error:  # noqa: BLE001
            # Raised again for everybody who follows.
            self.error = error
            log.error(event("pull_failed", model=self._target, reason=str(error)))
        else:
            log.info(event("pull_finished", model=self._target))
        finally:
            # Once this task is done.
            self._loop.call_soon(self._wake)

    def _report(self, progress: Progress) -> None:
        """What the download calls from its threads."""
        if self._cancelled.is_set():
            raise _Abandoned
        self._loop.call_soon_threadsafe(self._take, progress)

    def _take(self, progress: Progress) -> None:
        self.progress = progress
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Abandoned(Exception):
    """Nobody follows the download any more."""
