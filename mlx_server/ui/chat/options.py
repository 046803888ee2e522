"""The dialog in which a conversation's settings are made."""

from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from mlx_server.ui.chat.conversation import Options

EFFORTS = {
    "": "as the model does",
    "none": "none",
    "low": "low",
    "medium": "medium",
    "high": "high",
}
NUMBERS = (
    ("temperature", "Temperature", 0, 2, 0.1),
    ("top_p", "Top p", 0, 1, 0.05),
    ("top_k", "Top k", 0, 1000, 1),
    ("min_p", "Min p", 0, 1, 0.01),
    ("repetition_penalty", "Repetition penalty", 0.01, 2, 0.05),
    ("max_tokens", "Most tokens", 1, None, 1),
    ("seed", "Seed", 0, None, 1),
)
WHOLE = ("top_k", "max_tokens", "seed")
SCHEMA_HINT = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'


def options_dialog(
    options: Options, own: dict[str, Any], on_close: Callable[[], Awaitable[None]]
) -> ui.dialog:
    """`own` is what the model recommends, by the names of OpenAI's API."""
    dialog = ui.dialog().props('position="right" full-height')
    with dialog, ui.card().classes("options"):
        with ui.row().classes("between items-center"):
            ui.label("Settings of this conversation").classes("title")
            ui.button(icon="close", on_click=dialog.close).props(
                'flat round dense aria-label="Close"'
            )
        _text(options, "system", "System prompt", "")
        with ui.element("div").classes("grid"):
            for name, label, least, most, step in NUMBERS:
                _number(options, name, label, least, most, step, own.get(name))
        ui.select(
            EFFORTS,
            label="Thinking",
            value=options.reasoning_effort,
            on_change=lambda e: setattr(options, "reasoning_effort", e.value),
        ).props("outlined dense")
        _text(options, "stop", "Stop at (one a line)", "")
        _text(options, "schema", "JSON schema of answers", SCHEMA_HINT)
        _text(options, "tools", "Tools (OpenAI's JSON)", '[{"type": "function", …}]')
    dialog.on("hide", on_close)
    return dialog


def _text(options: Options, name: str, label: str, hint: str) -> None:
    field = ui.textarea(
        label,
        placeholder=hint,
        value=getattr(options, name),
        on_change=lambda e: setattr(options, name, e.value or ""),
    )
    field.props("outlined dense autogrow")
    if name in ("schema", "tools"):
        field.classes("mono")


def _number(
    options: Options,
    name: str,
    label: str,
    least: float,
    most: float | None,
    step: float,
    own: float | None,
) -> None:
    def take(value: float | None) -> None:
        whole = name in WHOLE and value is not None
        setattr(options, name, int(value) if whole and value is not None else value)

    ui.number(
        label,
        value=getattr(options, name),
        min=least,
        max=most,
        step=step,
        placeholder="" if own is None else f"{own:g}",
        on_change=lambda e: take(e.value),
    ).props("outlined dense clearable stack-label")
