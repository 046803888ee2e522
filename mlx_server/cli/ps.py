"""`ps`: the models of a running server."""

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mlx_server.cli.options import (
    ConfigOption,
    HostOption,
    JsonOption,
    KeyOption,
    PortOption,
    gigabytes,
    print_json,
)
from mlx_server.cli.remote import Remote, find_remote
from mlx_server.cli.tables import Column, table
from mlx_server.cli.terminal import quiet_keyboard
from mlx_server.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

FIGURES = {
    "Memory": 1,
    "In flight": 2,
    "Waiting": 3,
    "Restarts": 5,
    "Expires": 4,
    "PID": 7,
    "Reserved": 8,
    "Last used": 6,
}
"""What is shown beside the state, and its rank where there is little room."""
WATCH_SECONDS = 1.0
UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def ps(
    watch: Annotated[bool, Option("--watch", "-w", help="Go on showing, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    host: HostOption = None,
    port: PortOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Show the models that a running server holds."""
    from rich.console import Console

    remote = find_remote(host, port, api_key, config)
    if watch:
        # Ctrl-C is the way out.
        with suppress(KeyboardInterrupt):
            _watch(remote, as_json)
        return
    models = _present(remote)
    if as_json:
        print_json(models)
    else:
        Console().print(_shown(models, Console().width))


def _present(remote: Remote) -> list[dict[str, Any]]:
    return [model for model in remote.admin_models() if model["state"] != "absent"]


def _watch(remote: Remote, as_json: bool) -> None:
    """A table that renews itself, or a line of JSON each time. A server that is away may return."""
    import json

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    models = _present(remote)
    if as_json:
        while True:
            print(json.dumps(models), flush=True)
            time.sleep(WATCH_SECONDS)
            models = _present(remote)
    console = Console()
    live = Live(_shown(models, console.width), console=console, auto_refresh=False)
    with quiet_keyboard(), live:
        while True:
            time.sleep(WATCH_SECONDS)
            try:
                live.update(_shown(_present(remote), console.width), refresh=True)
            except Unavailable as error:
                live.update(Text(str(error), style="yellow"), refresh=True)


def _shown(models: list[dict[str, Any]], width: int) -> "RenderableType":
    return _table(models, width) if models else "No model is loaded."


def _table(models: list[dict[str, Any]], width: int) -> "Table":
    cells = [_cells(model) for model in models]
    figures = [
        Column(name, [one[name] for one in cells], rank, number=True)
        for name, rank in FIGURES.items()
    ]
    ids = Column("ID", [model["id"] for model in models])
    return table([ids, Column("State", [_state(model) for model in models]), *figures], width)


def _cells(model: dict[str, Any]) -> dict[str, str]:
    memory = model["memory"]
    return {
        "PID": str(model["pid"] or "-"),
        "Memory": gigabytes(memory and memory["active"]),
        "Reserved": gigabytes(model["need"]),
        "In flight": str(model["in_flight"]),
        "Waiting": str(model["waiting"] + model["waiting_to_load"]),
        "Restarts": str(model["restarts"]),
        "Last used": _ago(model["last_used"]),
        "Expires": _until(model["expires"]),
    }


def _state(model: dict[str, Any]) -> str:
    download = model["download"]
    if download and download["total"]:
        return f"{model['state']} {download['completed'] / download['total']:.0%}"
    return f"{model['state']}, pinned" if model["pinned"] else str(model["state"])


def _ago(moment: float | None) -> str:
    return "-" if moment is None else f"{_duration(time.time() - moment)} ago"


def _until(moment: float | None) -> str:
    return "-" if moment is None else f"in {_duration(moment - time.time())}"


def _duration(seconds: float) -> str:
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
