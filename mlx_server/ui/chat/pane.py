"""One model's side of a conversation."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nicegui import ui

from mlx_server.ui.api import Api
from mlx_server.ui.browser import Browser
from mlx_server.ui.chat.conversation import Lane, Message, Options, request_body
from mlx_server.ui.chat.generation import Answering
from mlx_server.ui.chat.row import Row
from mlx_server.ui.controls import warn


class Pane:
    """`on_change` is called when an answer begins or ends, and when a branch is chosen."""

    def __init__(
        self,
        lane: Lane,
        options: Options,
        api: Callable[[], Api],
        browser: Browser,
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self.lane = lane
        self._options = options
        self._api = api
        self._browser = browser
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._rows: list[Row] = []
        self._box = ui.element("div").classes("messages")
        self._box.props('role="log" aria-live="polite" aria-label="Messages" tabindex="0"')
        self._draw()

    @property
    def busy(self) -> bool:
        return self._task is not None

    async def send(self, text: str) -> None:
        await self._answer(self.lane.append("user", text).id)

    async def stop(self) -> None:
        if (task := self._task) is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    # what rows ask for

    async def retry(self, message: Message) -> None:
        await self._answer(message.parent)

    async def edit(self, message: Message, text: str) -> None:
        if text.strip():
            await self._answer(self.lane.add(message.parent, "user", text).id)

    async def choose(self, message: Message) -> None:
        await self.stop()
        self.lane.choose(message)
        self._draw()
        await self._on_change()

    async def give_results(self, message: Message, results: list[str]) -> None:
        for call, result in zip(message.calls, results, strict=True):
            call.result = result
        await self._answer(message.id)

    def copy(self, text: str) -> None:
        self._browser.run(f"copy({json.dumps(text)})")
        ui.notify("Copied")

    # answering

    async def _answer(self, parent: int) -> None:
        await self.stop()
        try:
            body = request_body(self.lane, self._options, parent)
        except ValueError as error:
            warn(str(error))
            self._draw()
            return
        message = self.lane.add(parent, "assistant")
        message.model = self.lane.model
        self._draw(answering=True)
        self._task = asyncio.create_task(self._run(message, body, self._rows[-1]))
        await self._on_change()

    async def _run(self, message: Message, body: dict[str, object], row: Row) -> None:
        def show() -> None:
            row.update()
            self._browser.run("follow(false)")

        try:
            await Answering(message, show).run(self._api(), body)
        finally:
            self._task = None
            if not self._box.is_deleted:
                row.end()
                await self._on_change()

    def _draw(self, *, answering: bool = False) -> None:
        """With `answering` the last message is not whole yet."""
        self._box.clear()
        path = self.lane.path()
        with self._box:
            self._rows = [
                Row(message, self, ended=True) for message in path[: -1 if answering else None]
            ]
            if answering:
                self._rows.append(Row(path[-1], self, ended=False))
        self._browser.run("follow(true)")
