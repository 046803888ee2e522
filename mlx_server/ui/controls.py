"""Small parts that all views use."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nicegui import ui

Named = TypeVar("Named", bound=ui.element)
Handler = Callable[[], Awaitable[Any] | Any]


def icon_button(icon: str, label: str, on_click: Handler, flags: str = "") -> ui.button:
    """`label` is read aloud, and shown when pointed at."""
    button = ui.button(icon=icon, on_click=on_click)
    button.props(f'flat round dense size="sm" {flags}')
    button.props["title"] = label
    return labelled(button, label)


def labelled(element: Named, label: str) -> Named:
    """`label`, which is read aloud, may hold anything, such as a name that somebody chose."""
    element.props["aria-label"] = label
    return element


def warn(message: str) -> None:
    ui.notify(message, type="negative", multi_line=True, close_button="Close", timeout=10_000)


async def confirmed(question: str, action: str) -> bool:
    """Ask before something that cannot be undone."""
    with ui.dialog() as dialog, ui.card():
        ui.label(question)
        with ui.row().classes("end"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat autofocus")
            ui.button(action, on_click=lambda: dialog.submit(True), color="negative")
    answer = await dialog
    dialog.delete()
    return bool(answer)
