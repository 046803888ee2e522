"""What `mlx-server ps` shows: the models of a running server, asked over its admin API."""

import time
from typing import Any

import httpx2
from rich.table import Table

from mlx_server.config import Settings
from mlx_server.errors import Unavailable

SECONDS = 10.0
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
FIGURES = (
    *("PID", "Memory", "Reserved", "In flight", "Waiting", "Restarts"),
    *("Last used", "Expires"),
)
UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def ask(settings: Settings, api_key: str | None) -> list[dict[str, Any]]:
    """What the server at `settings.host` and `settings.port` tells of each of its models.

    Without `api_key` the first key in the settings is shown. Raises Unavailable when no such
    server answers, or when it refuses.
    """
    keys = [key.get_secret_value() for key in (*settings.admin_keys, *settings.api_keys)]
    key = api_key or next(iter(keys), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = _url(settings)
    try:
        with httpx2.Client(timeout=SECONDS, trust_env=False) as client:
            answer = client.get(f"{url}/admin/models", headers=headers)
        body = answer.json()
        if answer.status_code != 200:
            raise Unavailable(f"the server at {url} refused: {body['error']['message']}")
        models: list[dict[str, Any]] = body["models"]
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise Unavailable(f"no server answers at {url} ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"what answers at {url} is no mlx-server") from error
    return models


def table(models: list[dict[str, Any]]) -> Table:
    """The models as lines of a table."""
    made = Table("ID", "State", box=None, pad_edge=False, header_style="bold")
    made.columns[0].no_wrap = True
    for name in FIGURES:
        made.add_column(name, justify="right")
    for model in models:
        made.add_row(*_cells(model))
    return made


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


def _url(settings: Settings) -> str:
    host = WILDCARDS.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
