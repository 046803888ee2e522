"""What `serve` shows once it listens: where, what, and what to do next; models as they load."""

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_server import __version__
from mlx_server.api.page.process import installed
from mlx_server.api.page.routes import PATH as PAGE
from mlx_server.cli.options import gigabytes
from mlx_server.cli.remote import url_of
from mlx_server.models.store.demo import DEMO

if TYPE_CHECKING:
    from mlx_server.config import Settings
    from mlx_server.models.pool.manager import ModelPoolManager
    from mlx_server.models.pool.status import ModelStatus

REFRESH_SECONDS = 0.25


@dataclass(frozen=True)
class Greeting:
    """`known`: models that can be asked for."""

    settings: "Settings"
    known: int

    @property
    def url(self) -> str:
        host = self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @property
    def first_line(self) -> str:
        """Programs read it, too."""
        models = ", ".join(self.settings.models) or "on demand"
        ollama = self.settings.ollama_port
        place = f"{self.url} and as Ollama at port {ollama}" if ollama else self.url
        return f"mlx-server {__version__} answers at {place} (models: {models})"

    def rows(self, memory: str) -> list[tuple[str, str]]:
        here = url_of(self.settings.host, self.settings.port)
        rows = [("page", f"{here}{PAGE}")] if self.settings.ui and installed() else []
        rows += [
            ("API", f"{here}/v1, described at {here}/docs"),
            ("models", self._models()),
            ("memory", memory),
        ]
        return [*rows, ("next", self._next())]

    def _models(self) -> str:
        if not self.known:
            return f"none yet: `mlx-server pull {DEMO}` fetches one"
        known = f"{self.known} can be asked for"
        named = ", ".join(self.settings.models)
        return f"{named} at once, {known}" if named else known

    def _next(self) -> str:
        port = "" if self.settings.port == 8000 else f" --port {self.settings.port}"
        return f"mlx-server chat{port}, mlx-server ps --watch{port}; Ctrl-C stops"


def print_greeting(greeting: Greeting, pool: "ModelPoolManager") -> None:
    """The first line, and on a terminal the rest."""
    print(greeting.first_line, flush=True)
    if not sys.stdout.isatty():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in greeting.rows(_memory(pool)):
        table.add_row(Text(f"  {name}", style="bold"), Text(value, overflow="fold"))
    Console(highlight=False).print(table)


def _memory(pool: "ModelPoolManager") -> str:
    device = pool.device
    if device is None:
        return "-"
    limit = pool.settings.memory_limit
    return (
        f"{gigabytes(pool.planner.budget)} for models: {limit} of the {gigabytes(device.memory)}"
        f" of this machine ({device.name})"
    )


async def show_loading(pool: "ModelPoolManager") -> None:
    """On a terminal: the models that load, until those named at the start are loaded or failed."""
    if not sys.stderr.isatty() or not pool.statuses():
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    console = Console(stderr=True, highlight=False, markup=False)
    begun = time.monotonic()
    spinner = Spinner("dots")
    live = Live(spinner, console=console, auto_refresh=False, transient=True)
    loaded = asyncio.create_task(pool.start_failure())
    shown: set[str] = set()
    try:
        with live, _logs_above():
            while not loaded.done():
                loading = [one for one in pool.statuses() if one.state == "loading"]
                shown.update(one.id for one in loading)
                spinner.update(text=_loading_text(loading, time.monotonic() - begun))
                live.refresh()
                await asyncio.wait([loaded], timeout=REFRESH_SECONDS)
    finally:
        loaded.cancel()
    for status in pool.statuses():
        if status.id in shown:
            console.print(_outcome(status), style="green" if status.state == "ready" else "red")


def _loading_text(loading: list["ModelStatus"], seconds: float) -> str:
    names = ", ".join(
        f"{one.id} ({gigabytes(one.need)})" if one.need else one.id for one in loading
    )
    return f"loading {names}, {seconds:.0f} s"


def _outcome(status: "ModelStatus") -> str:
    if status.state != "ready":
        return f"{status.id} is {status.state}: {status.reason or 'no reason was given'}"
    context = f", context {status.context_length:,}" if status.context_length else ""
    seconds = f" after {status.load_seconds:.1f} s" if status.load_seconds is not None else ""
    memory = gigabytes(status.memory.active) if status.memory else "-"
    return f"{status.id} is ready{seconds} ({memory}{context})"


@contextmanager
def _logs_above() -> Iterator[None]:
    """Log lines go above what `Live` draws, not through it: it has replaced sys.stderr."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)
