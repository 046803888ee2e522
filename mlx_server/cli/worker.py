"""`worker`: take ranks and replicas of a server's models on this machine."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mlx_server.cli.options import CommandError, ConfigOption, load_settings
from mlx_server.errors import reason
from mlx_server.starting import for_good

if TYPE_CHECKING:
    from mlx_server.config import Settings
    from mlx_server.models.hosts.worker import Server

MAX_SECRET = 4096


def worker(
    join: Annotated[
        str, Option("--join", metavar="HOST:PORT", help="Where the server lets workers join.")
    ],
    name: Annotated[
        str | None,
        Option(help="What the server calls this machine (default its host name)."),
    ] = None,
    address: Annotated[
        list[str] | None,
        Option(
            metavar="IP",
            help="This machine's address for MLX's ring (default as the server sees it). "
            "Repeatable.",
        ),
    ] = None,
    model_dir: Annotated[
        list[Path] | None,
        Option(metavar="FOLDER", help="A folder of MLX model folders. Repeatable."),
    ] = None,
    memory_limit: Annotated[
        str | None, Option(help="Memory for models: a share, or bytes like 12GB (default 80%).")
    ] = None,
    secret_stdin: Annotated[
        bool,
        Option(
            "--secret-stdin",
            help="Read the secret from standard input, and end when that ends.",
        ),
    ] = False,
    log_level: Annotated[
        str | None, Option(help="debug, info, warning or error (default info).")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Take ranks and replicas of a server's models on this machine.

    Both must know a secret: MLX_SERVER_WORKER_SECRET, or the setting worker_secret_file.
    """
    flags = {"model_dirs": model_dir or None, "memory_limit": memory_limit, "log_level": log_level}
    with for_good():
        settings = load_settings(config, **flags)
        server = _server(join, _secret_of_stdin() if secret_stdin else _secret(settings))
    _set_up_logging(settings)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(settings, server, name or _own_name(), address or [], secret_stdin))


def _server(join: str, secret: str) -> "Server":
    from mlx_server.models.hosts.worker import Server

    host, _, port = join.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise CommandError(f"--join {join}: it wants HOST:PORT")
    return Server(host, int(port), secret.encode())


def _secret(settings: "Settings") -> str:
    from mlx_server.models.hosts.machines import secret_of

    secret = secret_of(settings)
    if secret is None:
        raise CommandError(
            "a worker must show a secret: set MLX_SERVER_WORKER_SECRET or worker_secret_file"
        )
    return secret


def _secret_of_stdin() -> str:
    """Not read ahead: what follows is nothing but the end."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_SECRET:
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            break
        line += byte
    if not line.strip():
        raise CommandError("standard input holds no secret")
    return line.decode(errors="replace").strip()


def _own_name() -> str:
    import socket

    return socket.gethostname()


def _set_up_logging(settings: "Settings") -> None:
    from mlx_server.events import setup_logging

    try:
        setup_logging(
            settings.log_level, settings.log_format, settings.log_levels, settings.log_file
        )
    except OSError as error:
        raise CommandError(f"setting log_file: {reason(error)}") from error


async def _run(
    settings: "Settings", server: "Server", name: str, addresses: list[str], bound: bool
) -> None:
    """`bound`: end with standard input."""
    from mlx_server.models.hosts.worker import Worker
    from mlx_server.models.pool.device import find_device

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, ended.set)
    if bound:
        loop.add_reader(sys.stdin.fileno(), _read_to_end, ended)
    working = asyncio.create_task(
        Worker(settings, server, name, addresses, await find_device()).run()
    )
    print(f"mlx-server worker {name} joins {server}", flush=True)
    ending = asyncio.create_task(ended.wait())
    await asyncio.wait([working, ending], return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait([working])
    else:
        working.result()


def _read_to_end(ended: asyncio.Event) -> None:
    """Called when there is something to read."""
    if not os.read(sys.stdin.fileno(), MAX_SECRET):
        ended.set()
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
