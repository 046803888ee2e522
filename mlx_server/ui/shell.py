"""What is around all views: choosing one, the key, light and dark."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from nicegui import events, ui

from mlx_server.ui.api import Api, ApiError
from mlx_server.ui.browser import Browser
from mlx_server.ui.chat.view import ChatView
from mlx_server.ui.connect import ConnectView
from mlx_server.ui.controls import icon_button
from mlx_server.ui.history import HistoryView
from mlx_server.ui.models import ModelsView
from mlx_server.ui.requests import RequestsView

CONNECT_SECONDS = 60.0
TICK_SECONDS = 0.5
VIEWS: dict[str, Callable[[Callable[[], Api], Browser], "View"]] = {
    "chat": ChatView,
    "models": ModelsView,
    "charts": HistoryView,
    "requests": RequestsView,
    "connect": ConnectView,
}
PRIMARY = "#5b54e8"
DARK = "dark"
MODES = {"": None, "yes": True, "no": False}


class View(Protocol):
    title: str
    icon: str
    seconds: float
    """Between two refreshes while it is seen."""

    async def build(self) -> None:
        """Draw it for the first time. Raises ApiError with nothing drawn, since it is tried again,
        and what somebody had typed by then would go.
        """
        ...

    async def refresh(self) -> None: ...
    async def close(self) -> None: ...


class Shell:
    """One tab's page."""

    def __init__(self, api: Api, view: str) -> None:
        self._api = api
        self._shown = view
        self._client = ui.context.client
        self._browser = Browser(self._client)
        self._views = {name: make(lambda: self._api, self._browser) for name, make in VIEWS.items()}
        self._panels: dict[str, ui.tab_panel] = {}
        self._built: set[str] = set()
        self._due = 0.0
        self._busy = asyncio.Lock()

    async def show(self) -> None:
        self._dark = ui.dark_mode(None)
        self._draw()
        await self._client.connected(timeout=CONNECT_SECONDS)
        self._client.on_delete(self._close)
        self._api = self._api.with_key(await self._browser.key())
        self._dark.set_value(MODES.get(await self._browser.choice(DARK)))
        self._tabs.on_value_change(self._choose)
        await self._enter(self._shown)
        ui.timer(TICK_SECONDS, self._tick)

    def _draw(self) -> None:
        ui.colors(primary=PRIMARY)
        ui.html('<a class="skip" href="#main">To the content</a>', sanitize=False)
        with ui.header().classes("head items-center"):
            ui.label("mlx-server").classes("brand")
            with ui.tabs().props(
                "dense no-caps inline-label aria-label=Views shrink"
            ) as self._tabs:
                for name, view in self._views.items():
                    tab = ui.tab(name, label=view.title, icon=view.icon)
                    tab.props(f'aria-label="{view.title}"')
            ui.space()
            icon_button("key", "API key", self._ask_key)
            icon_button("contrast", "Light or dark", self._switch_dark)
        self._notice = ui.element("div").classes("notice").props('role="alert"')
        self._notice.set_visibility(False)
        with ui.tab_panels(self._tabs, value=self._shown, animated=False, keep_alive=True).props(
            "id=main"
        ):
            for name, view in self._views.items():
                self._panels[name] = ui.tab_panel(name).props(f'aria-label="{view.title}"')

    async def _choose(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self._shown = str(event.value)
        self._browser.run(f"place({self._shown!r})")
        await self._enter(self._shown)

    async def _enter(self, name: str) -> None:
        """Build a view when it is first seen, and bring it up to date."""
        async with self._busy:
            if self._client.is_deleted:
                return
            with self._panels[name]:
                try:
                    if name not in self._built:
                        self._panels[name].clear()
                        await self._views[name].build()
                        self._built.add(name)
                    else:
                        await self._views[name].refresh()
                except ApiError as error:
                    self._complain(error)
                else:
                    self._notice.set_visibility(False)
        self._due = asyncio.get_running_loop().time() + self._views[name].seconds

    async def _tick(self) -> None:
        if asyncio.get_running_loop().time() >= self._due and not self._busy.locked():
            await self._enter(self._shown)

    async def _close(self) -> None:
        for name in self._built:
            await self._views[name].close()

    # the key

    def _complain(self, error: ApiError) -> None:
        self._notice.clear()
        with self._notice:
            ui.label(str(error))
            if error.needs_key:
                ui.button("Enter a key", on_click=self._ask_key).props("dense unelevated no-caps")
        self._notice.set_visibility(True)

    def _ask_key(self) -> None:
        async def take() -> None:
            await self._browser.keep_key(key.value, kept.value)
            dialog.close()
            self._api = self._api.with_key(key.value)
            await self._enter(self._shown)

        with self._notice, ui.dialog() as dialog, ui.card().classes("key"):
            ui.label("API key").classes("title")
            ui.label("Sent to this server alone. An administrator's key opens every view.")
            with ui.element("form").props('onsubmit="return false"').on("submit", take):
                key = ui.input("Key", value=self._api.key, password=True).props(
                    "outlined dense autofocus autocomplete=current-password"
                )
                kept = ui.checkbox("Remember it in this browser")
                with ui.row():
                    ui.button("Use it").props("type=submit unelevated")
                    ui.button("Cancel", on_click=dialog.close).props("flat")
        dialog.on("hide", dialog.delete)
        dialog.open()

    async def _switch_dark(self) -> None:
        """From what the system says to the other one, and back."""
        now = await self._client.run_javascript("document.body.classList.contains('body--dark')")
        self._dark.set_value(not now)
        await self._browser.choose(DARK, "no" if now else "yes")
