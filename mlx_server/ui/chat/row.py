"""A message's place among the messages, with what can be done with it."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from nicegui import ui

from mlx_server.ui.chat.answer import AnswerView
from mlx_server.ui.chat.conversation import Lane, Message
from mlx_server.ui.controls import icon_button


class Deeds(Protocol):
    """What a row asks its pane to do."""

    lane: Lane

    async def retry(self, message: Message) -> None: ...
    async def edit(self, message: Message, text: str) -> None: ...
    async def choose(self, message: Message) -> None: ...
    async def give_results(self, message: Message, results: list[str]) -> None: ...
    def copy(self, text: str) -> None: ...


class Row:
    def __init__(self, message: Message, deeds: Deeds, *, ended: bool) -> None:
        self._message = message
        self._deeds = deeds
        self._answer: AnswerView | None = None
        mine = message.role == "user"
        self.box = ui.element("article").classes(f"message {message.role}")
        self.box.props(f'aria-label="{"Your message" if mine else "Answer"}"')
        with self.box:
            if not mine:
                ui.label(message.model).classes("who")
            self._body = ui.element("div").classes("body")
            self._after = ui.element("div")
            self._actions = ui.row().classes("actions items-center")
        with self._body:
            if mine:
                ui.label(message.content).classes("said")
            else:
                self._answer = AnswerView(message, f"Waiting for {message.model}…")
        if ended:
            self.end()

    def update(self) -> None:
        if self._answer is not None:
            self._answer.update()

    def end(self) -> None:
        """The message is whole: now it can be acted on."""
        if self._answer is not None:
            self._answer.update(ended=True)
        self._actions.clear()
        with self._actions:
            self._offer_branches()
            if self._message.role == "user":
                icon_button("edit", "Edit", self._edit)
            else:
                icon_button("refresh", "Retry", lambda: self._deeds.retry(self._message))
            icon_button("content_copy", "Copy", lambda: self._deeds.copy(self._message.content))
        if self._message.calls and all(call.result is None for call in self._message.calls):
            self._ask_for_results()

    def _offer_branches(self) -> None:
        siblings = self._deeds.lane.siblings(self._message)
        if len(siblings) == 1:
            return
        at = next(i for i, one in enumerate(siblings) if one.id == self._message.id)

        def to(index: int) -> Callable[[], Awaitable[None]]:
            return lambda: self._deeds.choose(siblings[index])

        back = icon_button("chevron_left", "Previous version", to(at - 1))
        ui.label(f"{at + 1}/{len(siblings)}").classes("figures")
        on = icon_button("chevron_right", "Next version", to((at + 1) % len(siblings)))
        back.set_enabled(at > 0)
        on.set_enabled(at + 1 < len(siblings))

    def _edit(self) -> None:
        self._body.clear()
        self._actions.clear()
        with self._body:
            text = ui.textarea(value=self._message.content).props(
                'autogrow outlined autofocus aria-label="Your message, edited"'
            )
            with ui.row():
                ui.button(
                    "Send", on_click=lambda: self._deeds.edit(self._message, text.value)
                ).props("dense unelevated")
                ui.button("Cancel", on_click=lambda: self._deeds.choose(self._message)).props(
                    "dense flat"
                )

    def _ask_for_results(self) -> None:
        with self._after:
            fields = [
                ui.textarea(f"Result of {call.name}").props("autogrow outlined dense")
                for call in self._message.calls
            ]

            async def give() -> None:
                await self._deeds.give_results(self._message, [one.value for one in fields])

            ui.button("Send results", on_click=give).props("dense unelevated")
