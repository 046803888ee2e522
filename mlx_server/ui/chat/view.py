"""The chat: conversations on the left, one or two panes, and where one writes."""

import asyncio
import copy
from collections.abc import Callable
from typing import Any

from nicegui import events, ui

from mlx_server.ui.api import Api
from mlx_server.ui.browser import Browser
from mlx_server.ui.chat.conversation import Conversation, Lane
from mlx_server.ui.chat.kept import KeptList
from mlx_server.ui.chat.options import options_dialog
from mlx_server.ui.chat.pane import Pane
from mlx_server.ui.controls import icon_button, warn

ENTER = """(event) => {
    if (event.shiftKey || event.isComposing) return;
    event.preventDefault();
    emit(event.target.value);
}"""
"""Enter sends, Shift+Enter breaks the line."""
MODEL = "model"
"""The choice that a browser keeps."""


class ChatView:
    title, icon = "Chat", "chat"
    seconds = 10.0

    def __init__(self, api: Callable[[], Api], browser: Browser) -> None:
        self._api = api
        self._browser = browser
        self._models: dict[str, dict[str, Any]] = {}
        self._conversation = Conversation()
        self._panes: list[Pane] = []
        self._choices: list[ui.select] = []
        self._usual_model = ""

    async def build(self) -> None:
        self._usual_model = await self._browser.choice(MODEL)
        await self.refresh()
        with ui.element("div").classes("chat"):
            self._kept = KeptList(self._browser, self._open)
            with ui.element("div").classes("talk"):
                self._bar = ui.element("div").classes("bar")
                self._panes_box = ui.element("div").classes("panes")
                self._build_composer()
        await self._open(Conversation())

    async def close(self) -> None:
        """Stop what is being answered."""
        await asyncio.gather(*(pane.stop() for pane in self._panes))

    async def refresh(self) -> None:
        """Read which models there are."""
        models = [one for one in await self._api().models() if _chats(one)]
        known = {one["id"]: one for one in models}
        if known != self._models:
            self._models = known
            for choice, lane in zip(self._choices, self._conversation.lanes, strict=False):
                choice.set_options(self._names(lane))

    # the parts

    def _build_composer(self) -> None:
        with ui.element("form").classes("composer").props('onsubmit="return false"'):
            self._draft = ui.textarea(placeholder="Ask something").classes("draft")
            self._draft.props('autogrow outlined dense aria-label="Your message" autofocus')
            self._draft.on("keydown.enter", lambda event: self._send(event.args), js_handler=ENTER)
            self._draft.on("keydown.escape", self.close)
            self._send_button = ui.button(
                icon="send", on_click=lambda: self._send(self._draft.value)
            ).props('round unelevated aria-label="Send"')
            self._stop_button = ui.button(icon="stop", on_click=self.close, color="negative")
            self._stop_button.props('round unelevated aria-label="Stop"')
            self._stop_button.set_visibility(False)

    def _draw_bar(self) -> None:
        self._bar.clear()
        with self._bar:
            icon_button("menu", "Conversations", self._kept.toggle).classes("narrow-only")
            self._choices = [
                self._model_choice(index, lane)
                for index, lane in enumerate(self._conversation.lanes)
            ]
            compared = len(self._conversation.lanes) > 1
            icon_button(
                "close_fullscreen" if compared else "compare",
                "One model only" if compared else "Compare two models",
                self._compare,
            )
            icon_button("tune", "Settings", self._show_options)
            with icon_button("download", "Export", lambda: None), ui.menu():
                ui.menu_item("As Markdown", lambda: self._export("md"))
                ui.menu_item("As JSON", lambda: self._export("json"))

    def _model_choice(self, index: int, lane: Lane) -> ui.select:
        async def choose(event: events.ValueChangeEventArguments[Any]) -> None:
            lane.model = event.value
            if index == 0:
                self._usual_model = event.value
                await self._browser.choose(MODEL, event.value)

        label = "Model" if len(self._conversation.lanes) == 1 else f"Model {index + 1}"
        choice = ui.select(
            self._names(lane), label=label, value=lane.model or None, on_change=choose
        )
        return choice.props("outlined dense options-dense").classes("model")

    def _names(self, lane: Lane) -> dict[str, str]:
        """What is offered, by id."""
        names = {id_: _label(model) for id_, model in self._models.items()}
        if lane.model and lane.model not in names:
            names[lane.model] = f"{lane.model} (gone)"
        return names

    async def _open(self, conversation: Conversation) -> None:
        await self.close()
        self._conversation = conversation
        for lane in conversation.lanes:
            lane.model = lane.model or self._first_model()
        self._kept.hide()
        self._draw()
        await self._kept.draw(conversation.id)
        self._browser.run("focus('.draft textarea')")

    def _first_model(self, besides: str = "") -> str:
        """The usual one, or else one that is loaded, or else any."""
        models = {id_: one for id_, one in self._models.items() if id_ != besides}
        if self._usual_model in models:
            return self._usual_model
        ready = [id_ for id_, model in models.items() if model["state"] == "ready"]
        return next(iter(ready or models), besides)

    def _draw(self) -> None:
        self._draw_bar()
        self._panes_box.clear()
        with self._panes_box:
            self._panes = [
                Pane(lane, self._conversation.options, self._api, self._browser, self._changed)
                for lane in self._conversation.lanes
            ]

    async def _changed(self) -> None:
        """An answer began or ended, or another branch is shown."""
        busy = any(pane.busy for pane in self._panes)
        self._send_button.set_visibility(not busy)
        self._stop_button.set_visibility(busy)
        if busy or not any(lane.messages for lane in self._conversation.lanes):
            return
        if not await self._browser.save(self._conversation):
            with self._bar:
                warn("This browser has no room left: remove some conversations.")
        await self._kept.draw(self._conversation.id)

    # what its user does

    async def _send(self, text: str) -> None:
        if not text.strip() or any(pane.busy for pane in self._panes):
            return
        if not all(lane.model for lane in self._conversation.lanes):
            warn("Choose a model first; the view “Models” can fetch one.")
            return
        self._draft.set_value("")
        for pane in self._panes:
            await pane.send(text)

    async def _compare(self) -> None:
        await self.close()
        lanes = self._conversation.lanes
        if len(lanes) > 1:
            del lanes[1:]
        else:
            second = copy.deepcopy(lanes[0])
            second.model = self._first_model(besides=second.model)
            lanes.append(second)
        self._draw()
        await self._changed()

    def _show_options(self) -> None:
        model = self._models.get(self._conversation.lanes[0].model, {})
        own = model.get("default_sampling") or {}
        with self._bar:
            options_dialog(self._conversation.options, own, self._changed).open()

    def _export(self, kind: str) -> None:
        conversation = self._conversation
        text = conversation.to_markdown() if kind == "md" else conversation.to_json()
        ui.download.content(text, f"chat-{conversation.id[:8]}.{kind}")


def _chats(model: dict[str, Any]) -> bool:
    capabilities = model["capabilities"]
    return capabilities is None or bool(capabilities["chat"])


def _label(model: dict[str, Any]) -> str:
    return str(model["id"]) if model["state"] == "ready" else f"{model['id']} ({model['state']})"
