"""The conversations that this browser keeps, as a list."""

from collections.abc import Awaitable, Callable

from nicegui import ui

from mlx_server.ui.browser import Browser, Kept
from mlx_server.ui.chat.conversation import Conversation
from mlx_server.ui.controls import confirmed, icon_button, warn


class KeptList:
    """`open_` is called with the one that was chosen."""

    def __init__(self, browser: Browser, open_: Callable[[Conversation], Awaitable[None]]) -> None:
        self._browser = browser
        self._open = open_
        self._current = ""
        self._box = ui.element("aside").classes("conversations")
        self._box.props('aria-label="Conversations"')

    def toggle(self) -> None:
        """On narrow screens it is shown when asked for."""
        self._box.classes(toggle="shown")

    def hide(self) -> None:
        self._box.classes(remove="shown")

    async def draw(self, current: str) -> None:
        """`current`: the id of the conversation that is open."""
        self._current = current
        kept = await self._browser.conversations()
        self._box.clear()
        with self._box:
            ui.button("New chat", icon="add", on_click=lambda: self._open(Conversation())).props(
                "outline no-caps"
            )
            with ui.element("ul"):
                for one in kept:
                    self._draw_one(one)
            if not kept:
                ui.label("Conversations stay in this browser.").classes("figures")

    def _draw_one(self, kept: Kept) -> None:
        item = ui.element("li")
        if kept.id == self._current:
            item.classes("current")
        with item:
            ui.button(kept.title or "Untitled", on_click=lambda: self._choose(kept.id)).props(
                'flat no-caps align="left"'
            )
            icon_button("delete", f"Remove {kept.title}", lambda: self._remove(kept))

    async def _choose(self, id_: str) -> None:
        conversation = await self._browser.load(id_)
        if conversation is None:
            warn("This conversation cannot be read any more.")
        else:
            await self._open(conversation)

    async def _remove(self, kept: Kept) -> None:
        if not await confirmed(f"Remove “{kept.title}”?", "Remove"):
            return
        await self._browser.remove(kept.id)
        if kept.id == self._current:
            await self._open(Conversation())
        await self.draw(self._current)
