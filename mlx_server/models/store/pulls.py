"""Downloads in this server: one per model, shared by its followers."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mlx_server.errors import ServerError, Unavailable
from mlx_server.events import event
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.fetch import fetch, fetch_target
from mlx_server.models.store.sources import ModelSources
from mlx_server.models.store.transfer import Progress

MAX_CONCURRENT = 4
KEPT_FAILURES = 32
STOP_SECONDS = 5.0

log = logging.getLogger("mlx_server.pulls")


@dataclass(frozen=True, slots=True)
class PullStatus:
    model: str
    progress: Progress
    error: str | None = None


class PullManager:
    """Runs each pull in a thread while anybody follows it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._pulls: dict[str, _Pull] = {}
        self._failures: dict[str, PullStatus] = {}
        self._stopping = False
        # The event loop's threads are for short work, such as tokenizing.
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="pull")

    def statuses(self) -> list[PullStatus]:
        """Running downloads and latest failures, one per model."""
        running = {name: PullStatus(name, pull.progress) for name, pull in self._pulls.items()}
        return list((self._failures | running).values())

    @asynccontextmanager
    async def follow(self, model_id: str) -> AsyncIterator[AsyncIterator[Progress]]:
        """Start or join the model's pull; yields its progress, skipping what a slow reader missed.
        Raises what the download failed with. The pull is cancelled when its last follower leaves
        early.
        """
        pull = await self._join(fetch_target(model_id, self._catalog.sources.aliases))
        pull.followers += 1
        try:
            yield pull.updates()
        finally:
            pull.followers -= 1
            if pull.followers == 0:
                pull.cancel()

    async def stop(self) -> None:
        """Cancel all; partial files remain."""
        self._stopping = True
        tasks = [pull.task for pull in self._pulls.values()]
        for pull in self._pulls.values():
            pull.cancel()
        if tasks:
            # Threads end at their next report; do not wait for silent ones.
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _join(self, target: str) -> "_Pull":
        while (pull := self._pulls.get(target)) is not None and pull.cancelled:
            await asyncio.wait([pull.task])
        if self._stopping:
            raise Unavailable("The server is stopping.", retry_after=1)
        if pull is None:
            pull = self._pulls[target] = _Pull(target, self._catalog.sources, self._threads)
            pull.task.add_done_callback(lambda _: self._ended(target))
            self._failures.pop(target, None)
        return pull

    def _ended(self, target: str) -> None:
        pull = self._pulls.pop(target)
        self._catalog.refresh()
        if pull.cancelled or pull.error is None:
            return
        message = pull.error.message if isinstance(pull.error, ServerError) else "internal error"
        self._failures[target] = PullStatus(target, pull.progress, message)
        while len(self._failures) > KEPT_FAILURES:
            self._failures.pop(next(iter(self._failures)))


class _Pull:
    def __init__(self, target: str, sources: ModelSources, threads: ThreadPoolExecutor) -> None:
        self.followers = 0
        self.progress = Progress("Starting")
        self.error: Exception | None = None
        self._target = target
        self._sources = sources
        self._threads = threads
        self._cancelled = threading.Event()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.create_task(self._run(), name=f"pull {target}")

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    async def updates(self) -> AsyncIterator[Progress]:
        """The latest progress after each change. Raises the download's error."""
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
                self._threads, fetch, self._target, self._sources, self._report
            )
        except _Cancelled:
            self.error = Unavailable(f"The pull of {self._target} was cancelled.")
            log.info(event("pull_cancelled", model=self._target, bytes=self.progress.done))
        except Exception as error:  # noqa: BLE001
            # Every follower raises it.
            self.error = error
            log.error(event("pull_failed", model=self._target, reason=str(error)))
        else:
            log.info(event("pull_finished", model=self._target))
        finally:
            # The task is done only in the loop's next turn.
            self._loop.call_soon(self._notify)

    def _report(self, progress: Progress) -> None:
        """Runs in the download's threads."""
        if self._cancelled.is_set():
            raise _Cancelled
        self._loop.call_soon_threadsafe(self._update, progress)

    def _update(self, progress: Progress) -> None:
        self.progress = progress
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Cancelled(Exception): ...
