"""`ps`: the models of a running server."""

import time
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mlx_server.cli.options import ConfigOption, load_settings
from mlx_server.errors import Unavailable

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_server.config import Settings

TIMEOUT = 10.0
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
FIGURES = (
    *("PID", "Memory", "Reserved", "In flight", "Waiting", "Restarts"),
    *("Last used", "Expires"),
)
UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def ps(
    host: Annotated[str | None, Option(help="Where the server listens.")] = None,
    port: Annotated[int | None, Option(help="Its port.")] = None,
    api_key: Annotated[
        str | None, Option(metavar="KEY", help="An admin key, if it asks for one.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Show the models that a running server holds."""
    from rich.console import Console

    settings = load_settings(config, host=host, port=port)
    models = _ask(url_of(settings.host, settings.port), api_key or _first_key(settings))
    present = [model for model in models if model["state"] != "absent"]
    if not present:
        print("No model is loaded.")
        return
    Console().print(_table(present))


def url_of(host: str, port: int) -> str:
    host = WILDCARDS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _first_key(settings: "Settings") -> str | None:
    keys = (key.get_secret_value() for key in (*settings.admin_keys, *settings.api_keys))
    return next(keys, None)


def _ask(url: str, key: str | None) -> list[dict[str, Any]]:
    """Raises Unavailable for no server or a refusal."""
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(timeout=TIMEOUT, trust_env=False) as client:
            response = client.get(f"{url}/admin/models", headers=headers)
        body = response.json()
        if response.status_code != 200:
            raise Unavailable(f"the server at {url} refused: {body['error']['message']}")
        models: list[dict[str, Any]] = body["models"]
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise Unavailable(f"no server answers at {url} ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"what answers at {url} is no mlx-server") from error
    return models


def _table(models: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table("ID", "State", box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for name in FIGURES:
        table.add_column(name, justify="right")
    for model in models:
        table.add_row(*_cells(model))
    return table


def _cells(model: dict[str, Any]) -> list[str]:
    memory = model["memory"]
    return [
        model["id"],
        _state(model),
        str(model["pid"] or "-"),
        _bytes(memory and memory["active"]),
        _bytes(model["need"]),
        str(model["in_flight"]),
        str(model["waiting"] + model["waiting_to_load"]),
        str(model["restarts"]),
        _ago(model["last_used"]),
        _until(model["expires"]),
    ]


def _state(model: dict[str, Any]) -> str:
    download = model["download"]
    if download and download["total"]:
        return f"{model['state']} {download['completed'] / download['total']:.0%}"
    return f"{model['state']}, pinned" if model["pinned"] else str(model["state"])


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f} GB"


def _ago(moment: float | None) -> str:
    return "-" if moment is None else f"{_duration(time.time() - moment)} ago"


def _until(moment: float | None) -> str:
    return "-" if moment is None else f"in {_duration(moment - time.time())}"


def _duration(seconds: float) -> str:
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
