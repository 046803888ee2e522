"""The models: what is loaded, what that takes, fetching and removing."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nicegui import ui

from mlx_server.ui import words
from mlx_server.ui.api import Api, ApiError
from mlx_server.ui.browser import Browser
from mlx_server.ui.controls import confirmed, icon_button, labelled, warn

COLOURS = {
    "ready": "positive",
    "loading": "warning",
    "restarting": "warning",
    "draining": "warning",
    "downloading": "info",
    "failed": "negative",
    "absent": "grey-7",
}
NAMES = {"absent": "not loaded", "draining": "unloading"}
MOVING = ("last_used", "expires", "step_seconds", "last_lines")
"""Facts that change without being shown."""


class ModelsView:
    title, icon = "Models", "memory"
    seconds = 2.0

    def __init__(self, api: Callable[[], Api], browser: Browser) -> None:
        self._api = api
        self._browser = browser
        self._drawn = ""
        self._pulls: dict[str, asyncio.Task[None]] = {}

    async def build(self) -> None:
        with ui.element("div").classes("page"):
            self._budget = ui.element("div").classes("budget")
            with ui.element("form").classes("pull").props('onsubmit="return false"') as form:
                self._name = ui.input("Fetch a model", placeholder="mlx-community/…").props(
                    "outlined dense"
                )
                ui.button("Fetch", icon="cloud_download").props("type=submit unelevated no-caps")
            form.on("submit", self._start_pull)
            self._pulls_box = ui.element("div").classes("cards")
            self._box = ui.element("div").classes("cards")
        await self.refresh()

    async def refresh(self) -> None:
        found = await self._api().all_models()
        models = found["models"]
        seen = json.dumps([{k: v for k, v in one.items() if k not in MOVING} for one in models])
        if seen == self._drawn:
            return
        self._drawn = seen
        self._draw_budget(found["memory_budget"], models)
        self._box.clear()
        with self._box:
            for model in sorted(models, key=lambda one: (one["state"] == "absent", one["id"])):
                self._card(model)
            if not models:
                ui.label("No model is here yet. Fetch one, such as smollm2-135m.")

    async def close(self) -> None:
        """Downloads end with the page that follows them, and resume."""
        pulls = list(self._pulls.values())
        for task in pulls:
            task.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    # drawing

    def _draw_budget(self, budget: int, models: list[dict[str, Any]]) -> None:
        loaded = [one for one in models if one["memory"]]
        reserved = sum(one["need"] or 0 for one in loaded)
        used = sum(one["memory"]["active"] + one["memory"]["cache"] for one in loaded)
        self._budget.clear()
        with self._budget:
            ui.label(
                f"{words.size(reserved)} of {words.size(budget)} reserved for models"
                f", {words.size(used)} in use"
            )
            share = min(1.0, reserved / budget) if budget else 0.0
            bar = ui.linear_progress(share, show_value=False, size="12px")
            bar.props(f'rounded aria-label="Memory reserved: {share:.0%}"')

    def _card(self, model: dict[str, Any]) -> None:
        state = model["state"]
        with labelled(ui.element("section").classes("card"), model["id"]):
            with ui.row().classes("between items-center no-wrap"):
                ui.label(model["id"]).classes("title")
                ui.badge(NAMES.get(state, state), color=COLOURS[state]).classes("state")
            ui.label(_facts(model)).classes("figures")
            if model["memory"]:
                _memory(model)
            if model["reason"]:
                ui.label(model["reason"]).classes("error")
                if model["last_lines"]:
                    with ui.expansion("Last lines of its process").classes("thinking"):
                        ui.label("\n".join(model["last_lines"])).classes("lines")
            if model["download"]:
                _progress(model["download"])
            with ui.row().classes("actions items-center"):
                self._offer(model)

    def _offer(self, model: dict[str, Any]) -> None:
        id_, state = model["id"], model["state"]
        if state in ("absent", "failed") and model["path"]:
            self._button("Load", lambda: self._api().load(id_))
        if state in ("ready", "restarting"):
            self._button("Unload", lambda: self._api().unload(id_))
        if model["path"]:
            pinned = bool(model["pinned"])
            icon_button(
                "push_pin",
                "Let it make room for others" if pinned else "Pin: never make room for others",
                lambda: self._do(lambda: self._api().pin(id_, not pinned)),
                f"color={'primary' if pinned else 'grey-7'}",
            )
        if state in ("absent", "failed") and model["path"]:
            icon_button("delete", f"Remove {id_} from the disk", lambda: self._remove(model))

    def _button(self, label: str, deed: Callable[[], Awaitable[None]]) -> None:
        button = ui.button(label).props("dense unelevated no-caps")

        async def run() -> None:
            button.props("loading")
            await self._do(deed)
            if not button.is_deleted:
                button.props(remove="loading")

        button.on_click(run)

    # doing

    async def _do(self, deed: Callable[[], Awaitable[None]]) -> None:
        try:
            await deed()
            await self.refresh()
        except ApiError as error:
            if not self._box.is_deleted:
                with self._box:
                    warn(str(error))

    async def _remove(self, model: dict[str, Any]) -> None:
        with self._budget:
            sure = await confirmed(
                f"Remove {model['id']} ({words.size(model['size'])}) from the disk?", "Remove"
            )
        if sure:
            await self._do(lambda: self._api().remove(model["id"]))

    def _start_pull(self) -> None:
        name = self._name.value.strip()
        if not name or name in self._pulls:
            return
        self._name.set_value("")
        with self._pulls_box, ui.element("section").classes("card") as card:
            with ui.row().classes("between items-center no-wrap"):
                ui.label(name).classes("title")
                icon_button("close", f"Cancel {name}", lambda: self._cancel(name))
            told = ui.label("Asking for it…").classes("figures").props('role="status"')
            bar = ui.linear_progress(0.0, show_value=False, size="8px").props("rounded")
        task = asyncio.create_task(self._pull(name, card, told, bar))
        self._pulls[name] = task

    async def _cancel(self, name: str) -> None:
        if (task := self._pulls.get(name)) is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _pull(
        self, name: str, card: ui.element, told: ui.label, bar: ui.linear_progress
    ) -> None:
        try:
            async for event in self._api().pull(name):
                told.set_text(_progress_text(event))
                bar.set_value(_share(event))
        except ApiError as error:
            with self._box:
                warn(f"{name}: {error}")
        finally:
            del self._pulls[name]
            if not card.is_deleted:
                card.delete()
        await self._do(self.refresh)


def _facts(model: dict[str, Any]) -> str:
    facts = [
        words.size(model["size"]) if model["size"] else "",
        model["model_type"] or "",
        f"context {words.number(model['context_length'])}" if model["context_length"] else "",
        model["device"] or "",
        f"loaded in {words.seconds(model['load_seconds'])}" if model["load_seconds"] else "",
        f"{model['restarts']} restarts" if model["restarts"] else "",
        f"{model['running']} running, {model['waiting']} waiting" if model["in_flight"] else "",
        f"also {', '.join(model['aliases'])}" if model["aliases"] else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _memory(model: dict[str, Any]) -> None:
    memory = model["memory"]
    cached = model["prefix_cache"]
    text = f"{words.size(memory['active'])} in use, {words.size(memory['peak'])} at most"
    if model["need"]:
        text += f", {words.size(model['need'])} reserved"
    if cached:
        text += f"; {words.size(cached['bytes'])} of cached prefixes"
    ui.label(text).classes("figures")


def _progress(download: dict[str, Any]) -> None:
    ui.label(_progress_text(download)).classes("figures")
    ui.linear_progress(_share(download), show_value=False, size="8px").props("rounded")


def _progress_text(event: dict[str, Any]) -> str:
    done, total = event.get("completed"), event.get("total")
    sizes = f": {words.size(done)} of {words.size(total)}" if total else ""
    return f"{event['status']}{sizes}"


def _share(event: dict[str, Any]) -> float:
    return (event.get("completed") or 0) / (event.get("total") or 1)
