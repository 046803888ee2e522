"""The models: what is loaded, what that takes, fetching and removing."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nicegui import ui

from mlx_server.ui import words
from mlx_server.ui.api import Api, ApiError
from mlx_server.ui.browser import Browser
from mlx_server.ui.controls import confirmed, icon_button, warn
from mlx_server.ui.model_card import Budget, ModelCard, Progress


class ModelsView:
    title, icon = "Models", "memory"
    seconds = 2.0

    def __init__(self, api: Callable[[], Api], browser: Browser) -> None:
        self._api = api
        self._browser = browser
        self._cards: dict[str, ModelCard] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}

    async def build(self) -> None:
        found = await self._api().all_models()
        with ui.element("div").classes("page"):
            self._budget = Budget()
            with ui.element("form").classes("pull").props('onsubmit="return false"') as form:
                self._name = ui.input("Fetch a model", placeholder="mlx-community/…").props(
                    "outlined dense"
                )
                ui.button("Fetch", icon="cloud_download").props("type=submit unelevated no-caps")
            form.on("submit", self._start_pull)
            self._pulls_box = ui.element("div").classes("cards")
            self._none = ui.label("No model is here yet. Fetch one, such as smollm2-135m.")
            self._box = ui.element("div").classes("cards")
        self._show(found)

    async def refresh(self) -> None:
        self._show(await self._api().all_models())

    def _show(self, found: dict[str, Any]) -> None:
        models = sorted(found["models"], key=lambda one: (one["state"] == "absent", one["id"]))
        self._budget.show(found["memory_budget"], models)
        self._none.set_visibility(not models)
        for gone in self._cards.keys() - {one["id"] for one in models}:
            self._cards.pop(gone).box.delete()
        for model in models:
            if (card := self._cards.get(model["id"])) is not None:
                card.show(model)
                continue
            with self._box:
                self._cards[model["id"]] = ModelCard(model, self)
        order = [self._cards[model["id"]].box for model in models]
        if self._box.default_slot.children != order:
            for place, box in enumerate(order):
                box.move(target_index=place)

    async def close(self) -> None:
        """Downloads end with the page that follows them, and resume."""
        pulls = list(self._pulls.values())
        for task in pulls:
            task.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    # what cards ask for

    async def load(self, model: dict[str, Any]) -> None:
        await self._do(lambda: self._api().load(model["id"]))

    async def unload(self, model: dict[str, Any]) -> None:
        await self._do(lambda: self._api().unload(model["id"]))

    async def pin(self, model: dict[str, Any]) -> None:
        await self._do(lambda: self._api().pin(model["id"], not model["pinned"]))

    async def remove(self, model: dict[str, Any]) -> None:
        with self._pulls_box:
            sure = await confirmed(
                f"Remove {model['id']} ({words.size(model['size'])}) from the disk?", "Remove"
            )
        if sure:
            await self._do(lambda: self._api().remove(model["id"]))

    async def _do(self, deed: Callable[[], Awaitable[None]]) -> None:
        try:
            await deed()
            await self.refresh()
        except ApiError as error:
            if not self._box.is_deleted:
                with self._box:
                    warn(str(error))

    # fetching

    def _start_pull(self) -> None:
        name = self._name.value.strip()
        if not name or name in self._pulls:
            return
        self._name.set_value("")
        with self._pulls_box, ui.element("section").classes("card") as card:
            with ui.row().classes("between items-center no-wrap"):
                ui.label(name).classes("title")
                icon_button("close", f"Cancel {name}", lambda: self._cancel(name))
            progress = Progress("Asking for it…")
        task = asyncio.create_task(self._pull(name, card, progress))
        self._pulls[name] = task

    async def _cancel(self, name: str) -> None:
        if (task := self._pulls.get(name)) is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _pull(self, name: str, card: ui.element, progress: Progress) -> None:
        try:
            async for event in self._api().pull(name):
                progress.show(event)
        except ApiError as error:
            with self._box:
                warn(f"{name}: {error}")
        finally:
            del self._pulls[name]
            if not card.is_deleted:
                card.delete()
        await self._do(self.refresh)
