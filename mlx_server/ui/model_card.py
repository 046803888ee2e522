"""What the page shows of one model, and of the memory that all of them take.

Parts are made once and then changed: one that was made anew while somebody points at it, or has
the keyboard on it, would lose the click and the focus.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from nicegui import ui

from mlx_server.ui import words
from mlx_server.ui.controls import icon_button, labelled

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
PIN, UNPIN = "Pin: never make room for others", "Let it make room for others"


class Deeds(Protocol):
    """What a card asks its view to do."""

    async def load(self, model: dict[str, Any]) -> None: ...
    async def unload(self, model: dict[str, Any]) -> None: ...
    async def pin(self, model: dict[str, Any]) -> None: ...
    async def remove(self, model: dict[str, Any]) -> None: ...


class Progress:
    """How far a download is."""

    def __init__(self, told: str = "") -> None:
        self._told = ui.label(told).classes("figures").props('role="status"')
        self._bar = ui.linear_progress(0.0, show_value=False, size="8px").props("rounded")

    def show(self, event: dict[str, Any]) -> None:
        done, total = event.get("completed"), event.get("total")
        sizes = f": {words.size(done)} of {words.size(total)}" if total else ""
        self._told.set_text(f"{event['status']}{sizes}")
        self._bar.set_value((done or 0) / (total or 1))


class Budget:
    def __init__(self) -> None:
        with ui.element("div").classes("budget"):
            self._told = ui.label()
            self._bar = ui.linear_progress(0.0, show_value=False, size="12px").props("rounded")

    def show(self, budget: int, models: list[dict[str, Any]]) -> None:
        loaded = [one for one in models if one["memory"]]
        reserved = sum(one["need"] or 0 for one in loaded)
        used = sum(one["memory"]["active"] + one["memory"]["cache"] for one in loaded)
        share = min(1.0, reserved / budget) if budget else 0.0
        self._told.set_text(
            f"{words.size(reserved)} of {words.size(budget)} reserved for models"
            f", {words.size(used)} in use"
        )
        self._bar.set_value(share)
        self._bar.props(f'aria-label="Memory reserved: {share:.0%}"')


class ModelCard:
    def __init__(self, model: dict[str, Any], deeds: Deeds) -> None:
        self._model = model
        self.box = labelled(ui.element("section").classes("card"), model["id"])
        with self.box:
            with ui.row().classes("between items-center no-wrap"):
                ui.label(model["id"]).classes("title")
                self._state = ui.badge().classes("state")
            self._facts = ui.label().classes("figures")
            self._memory = ui.label().classes("figures")
            self._reason = ui.label().classes("error")
            self._lines_box = ui.expansion("Last lines of its process").classes("thinking")
            with self._lines_box:
                self._lines = ui.label().classes("lines")
            self._download_box = ui.element("div")
            with self._download_box:
                self._download = Progress()
            with ui.row().classes("actions items-center"):
                self._load = self._button("Load", deeds.load)
                self._unload = self._button("Unload", deeds.unload)
                self._pin = icon_button("push_pin", PIN, lambda: deeds.pin(self._model))
                self._remove = icon_button(
                    "delete",
                    f"Remove {model['id']} from the disk",
                    lambda: deeds.remove(self._model),
                )
        self.show(model)

    def show(self, model: dict[str, Any]) -> None:
        self._model = model
        state = model["state"]
        self._state.set_text(NAMES.get(state, state))
        self._state.props(f"color={COLOURS[state]}")
        self._facts.set_text(_facts(model))
        _tell(self._memory, _memory(model))
        _tell(self._reason, model["reason"])
        _tell(self._lines, "\n".join(model["last_lines"]) if model["reason"] else "")
        self._lines_box.set_visibility(bool(self._lines.text))
        self._download_box.set_visibility(bool(model["download"]))
        if model["download"]:
            self._download.show(model["download"])
        idle = state in ("absent", "failed") and bool(model["path"])
        self._load.set_visibility(idle)
        self._remove.set_visibility(idle)
        self._unload.set_visibility(state in ("ready", "restarting"))
        self._pin.set_visibility(bool(model["path"]))
        self._pin.props(f"color={'primary' if model['pinned'] else 'grey-7'}")
        self._pin.props["title"] = UNPIN if model["pinned"] else PIN
        labelled(self._pin, UNPIN if model["pinned"] else PIN)

    def _button(self, label: str, deed: Callable[[dict[str, Any]], Awaitable[None]]) -> ui.button:
        button = ui.button(label).props("dense unelevated no-caps")

        async def run() -> None:
            button.props("loading")
            await deed(self._model)
            if not button.is_deleted:
                button.props(remove="loading")

        return button.on_click(run)


def _tell(label: ui.label, text: str | None) -> None:
    """Nothing to tell takes no room."""
    label.set_text(text or "")
    label.set_visibility(bool(text))


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


def _memory(model: dict[str, Any]) -> str:
    memory, cached = model["memory"], model["prefix_cache"]
    if not memory:
        return ""
    text = f"{words.size(memory['active'])} in use, {words.size(memory['peak'])} at most"
    if model["need"]:
        text += f", {words.size(model['need'])} reserved"
    if cached:
        text += f"; {words.size(cached['bytes'])} of cached prefixes"
    return text
