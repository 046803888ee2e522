"""The latest requests, as a table."""

import json
import time
from collections.abc import Callable
from typing import Any

from nicegui import events, ui

from mlx_server.ui import words
from mlx_server.ui.api import Api
from mlx_server.ui.browser import Browser
from mlx_server.ui.markdown import code_block

COLUMNS = (
    ("time", "Time"),
    ("model", "Model"),
    ("protocol", "Protocol"),
    ("client", "Client"),
    ("state", "State"),
    ("prompt", "Prompt"),
    ("cached", "Cached"),
    ("completion", "Answer"),
    ("queue", "Queue"),
    ("prefill", "Prefill"),
    ("first", "First token"),
    ("decode", "Decode"),
    ("total", "Total"),
)
FIGURES = ("prompt", "cached", "completion", "queue", "prefill", "first", "decode", "total")
PAGE_ROWS = 50


class RequestsView:
    title, icon = "Requests", "list_alt"
    seconds = 2.0

    def __init__(self, api: Callable[[], Api], browser: Browser) -> None:
        self._api = api
        self._known: dict[str, dict[str, Any]] = {}

    async def build(self) -> None:
        found = await self._api().requests()
        with ui.element("div").classes("page wide"):
            with ui.row().classes("between items-center"):
                ui.label("Latest requests").classes("title")
                search = ui.input(placeholder="Find").props(
                    'dense outlined clearable aria-label="Find among requests"'
                )
            columns = [
                {
                    "name": name,
                    "label": label,
                    "field": name,
                    "align": "right" if name in FIGURES else "left",
                }
                for name, label in COLUMNS
            ]
            self._table = ui.table(rows=[], columns=columns, row_key="id", pagination=PAGE_ROWS)
            self._table.props('flat dense aria-label="Latest requests" no-data-label="None yet"')
            self._table.classes("requests").bind_filter_from(search, "value")
            self._table.on("row-click", self._open, args=[[], ["id"], None])
            ui.label("Choose a row to see all that is known of it; texts are not kept.").classes(
                "figures"
            )
        self._show(found)

    async def refresh(self) -> None:
        self._show(await self._api().requests())

    def _show(self, found: dict[str, Any]) -> None:
        requests = [*found["running"], *found["ended"]]
        self._known = {one["id"]: one for one in requests}
        rows = [_row(one) for one in requests]
        if rows != self._table.rows:
            self._table.rows = rows

    async def close(self) -> None:
        """Nothing is open."""

    def _open(self, event: events.GenericEventArguments) -> None:
        request = self._known.get(event.args[1]["id"])
        if request is None:
            return
        with self._table, ui.dialog() as dialog, ui.card().classes("details"):
            ui.label(request["id"]).classes("title")
            if request["error"]:
                ui.label(request["error"]).classes("error")
            ui.html(code_block(json.dumps(request, indent=2), "json"))
            ui.button("Close", on_click=dialog.close).props("flat autofocus")
        dialog.on("hide", dialog.delete)
        dialog.open()


def _row(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": request["id"],
        "time": time.strftime("%H:%M:%S", time.localtime(request["at"])),
        "model": request["model"] or "-",
        "protocol": request["protocol"],
        "client": request["client"],
        "state": _state(request),
        "prompt": words.number(request["prompt_tokens"]),
        "cached": words.number(request["cached_tokens"]),
        "completion": words.number(request["completion_tokens"]),
        "queue": words.seconds(request["queue_seconds"]),
        "prefill": words.seconds(request["prefill_seconds"]),
        "first": words.seconds(request["first_token_seconds"]),
        "decode": words.seconds(request["decode_seconds"]),
        "total": words.seconds(request["seconds"]),
    }


def _state(request: dict[str, Any]) -> str:
    if request["seconds"] is None:
        return "running"
    if request["error"]:
        return f"{request['status'] or ''} error".strip()
    return ", ".join(dict.fromkeys(request["finish"])) or str(request["status"] or "left")
