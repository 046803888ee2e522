"""The server that a program is pointed at: one that runs, or one started for it."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_server.cli.launch.keeper import ENDED, LOG
from mlx_server.cli.options import CommandError
from mlx_server.cli.remote import url_of
from mlx_server.errors import Unavailable

if TYPE_CHECKING:
    from mlx_server.config import Settings

ANSWER_SECONDS = 10.0
POLL_SECONDS = 0.1
NO_KEY = "mlx-server"
"""Shown where no key is asked for: programs want one."""
GREETING = re.compile(r"answers at (http://\S+)")


@dataclass(frozen=True)
class Offer:
    """A model that can be chosen; `loaded`: it answers at once."""

    id: str
    context: int | None
    loaded: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    url: str
    key: str


def configured(settings: "Settings", key: str | None) -> Server:
    """The one that the settings describe, whether it runs or not."""
    keys = (one.get_secret_value() for one in (*settings.api_keys, *settings.admin_keys))
    return Server(url_of(settings.host, settings.port), key or next(keys, NO_KEY))


def offers_of(server: Server) -> list[Offer] | None:
    """The chat models of a running server; None if none answers there, or a stranger does. Raises
    Unavailable if it refuses.
    """
    import httpx2

    try:
        with httpx2.Client(timeout=ANSWER_SECONDS, trust_env=False) as client:
            answer = client.get(
                f"{server.url}/v1/models", headers={"Authorization": f"Bearer {server.key}"}
            )
        body = answer.json()
        if answer.status_code != 200:
            raise Unavailable(f"the server at {server.url} refused: {body['error']['message']}")
        models: list[dict[str, Any]] = body["data"]
        if any(model["owned_by"] != "mlx-server" for model in models):
            return None
        return [_offer(model) for model in models if _chats(model)]
    except (httpx2.TransportError, ValueError, KeyError, TypeError):
        return None
    except httpx2.InvalidURL as error:
        raise CommandError(f"{server.url} is no address ({error})") from error


def _chats(model: dict[str, Any]) -> bool:
    capabilities = model["capabilities"]
    return capabilities is None or bool(capabilities["chat"])


def _offer(model: dict[str, Any]) -> Offer:
    return Offer(
        model["id"], model["context_length"], model["state"] == "ready", tuple(model["aliases"])
    )


def start_keeper(folder: Path, server: list[str]) -> None:
    """It lives for as long as this process, whatever program that becomes."""
    subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.keeper", str(os.getpid()), str(folder), *server],
        # Modules of the folder that the user works in are none of ours.
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Away from the terminal and its signals.
        start_new_session=True,
    )


def serve_command(model: str, config: Path | None) -> list[str]:
    command = [sys.executable, "-m", "mlx_server", "serve"]
    command += ["--host", "127.0.0.1", "--port", "0", "--model", model]
    return [*command, *(["--config", str(config)] if config else [])]


def started(folder: Path, key: str) -> Server:
    """Wait for the server that a keeper starts. Raises CommandError with its last words."""
    while True:
        log = _read(folder / LOG)
        if ENDED in log:
            raise CommandError(f"the server did not start: {_last_words(log)}")
        if (greeting := GREETING.search(log)) and _ready(greeting[1]):
            return Server(greeting[1], key)
        time.sleep(POLL_SECONDS)


def _read(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _ready(url: str) -> bool:
    import httpx2

    try:
        with httpx2.Client(timeout=ANSWER_SECONDS, trust_env=False) as client:
            return client.get(f"{url}/ready").status_code == 200
    except httpx2.TransportError:
        return False


def _last_words(log: str) -> str:
    lines = [line for line in log.splitlines() if line and line != ENDED]
    return lines[-1].removeprefix("mlx-server: ") if lines else "it said nothing"
