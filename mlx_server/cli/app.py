"""The command line: `serve`, `pull`, `list`, `ps`, `rm`.

Only reads flags, prints, and puts the parts together. What is slow to import is imported by the
command that needs it, so that help comes at once.
"""

import errno
import os
import signal
import socket
import sys
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mlx_server import __version__
from mlx_server.errors import ModelNotFound, ServerError

if TYPE_CHECKING:
    from mlx_server.config import Settings
    from mlx_server.models.store.catalog import Catalog

app = typer.Typer(
    help="Serve MLX language models over the OpenAI API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

SEND_BUFFER = 128 << 10
"""Bytes that the system keeps of an answer for a client that does not read it."""

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A TOML file of settings.")
]


class CommandError(Exception):
    """What the user is told in one line before the command ends."""


def main() -> None:
    """The `mlx-server` command."""
    try:
        app()
    except (CommandError, ServerError) as error:
        message = " ".join(str(error).split())
        print(f"mlx-server: {message}", file=sys.stderr)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-server {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Serve MLX language models over the OpenAI API."""


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="ID|PATH", help="Load this model at start. Repeatable."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one (default 8000).")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key that callers must show. Repeatable."),
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Listen beyond this machine without a key.")
    ] = False,
    model_dir: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A folder of MLX model folders. Repeatable."),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Requests decoded together per model (default 32).")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Memory for models: a share, or bytes like 12GB (default 80%)."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Caps every model's context, in tokens.")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantize KV caches to 8 or 4 bits (default: do not).")
    ] = None,
    dequantize: Annotated[
        str | None, typer.Option(help="Dequantize weights at load: auto, always, never.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error (default info).")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Start the server."""
    settings = _settings(
        config,
        models=model or None,
        host=host,
        port=port,
        api_keys=api_key or None,
        allow_no_key=allow_no_key or None,
        model_dirs=model_dir or None,
        max_batch=max_batch,
        memory_limit=memory_limit,
        context_length=context_length,
        kv_bits=kv_bits,
        dequantize=dequantize,
        log_level=log_level,
    )
    addresses = _addresses(settings)
    _require_key(settings, addresses)
    sockets = _bind(settings, addresses)
    settings = settings.model_copy(update={"port": sockets[0].getsockname()[1]})
    catalog = _catalog_with_models(settings)
    _run(settings, catalog, sockets)


@app.command()
def pull(
    model: Annotated[
        str, typer.Argument(metavar="ID|GGUF", help="ORG/NAME, smollm2-135m, or a GGUF file.")
    ],
    config: ConfigOption = None,
) -> None:
    """Fetch a model, so that it can be served."""
    from mlx_server.models.store.catalog import Catalog

    settings = _settings(config)
    if os.path.isfile(os.path.expanduser(model)):
        path = Catalog(settings).add(model).path
    else:
        path = _pull(model, settings)
    print(f"{model} is ready in {path}")


@app.command("list")
def list_models(config: ConfigOption = None) -> None:
    """Show the models that can be served now."""
    from rich.console import Console
    from rich.table import Table

    from mlx_server.models.store.catalog import DEMO, Catalog

    entries = Catalog(_settings(config)).entries()
    if not entries:
        print(f"No models yet. Try `mlx-server pull {DEMO}`.")
        return
    table = Table("ID", "Source", "Type", box=None, pad_edge=False, header_style="bold")
    table.columns[0].overflow = "fold"
    table.add_column("Size", justify="right")
    table.add_column("Context", justify="right")
    for entry in entries:
        context = f"{entry.context_length:,}" if entry.context_length else "?"
        table.add_row(entry.id, entry.source, entry.model_type, _gigabytes(entry.size), context)
    Console().print(table)


@app.command()
def ps(
    host: Annotated[str | None, typer.Option(help="Where the server listens.")] = None,
    port: Annotated[int | None, typer.Option(help="Its port.")] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="An admin key, if it asks for one.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Show the models that a running server holds."""
    from rich.console import Console

    from mlx_server.cli import ps as running

    settings = _settings(config, host=host, port=port)
    models = [model for model in running.ask(settings, api_key) if model["state"] != "absent"]
    if not models:
        print("No model is loaded.")
        return
    Console().print(running.table(models))


@app.command()
def rm(
    model: Annotated[str, typer.Argument(metavar="ID", help="As `mlx-server list` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigOption = None,
) -> None:
    """Remove a model from the disk, unless a server has it loaded."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.removal import plan_removal, remove

    settings = _settings(config)
    entry = Catalog(settings).find(model)
    removal = plan_removal(entry, settings)
    if not yes and sys.stdin.isatty():
        typer.confirm(
            f"Remove {entry.id} ({_gigabytes(entry.size)}) in {removal.place}?", abort=True
        )
    remove(removal, settings)
    print(f"{entry.id} is removed.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _settings(config: Path | None, **flags: Any) -> "Settings":
    """The settings, or the one line that says which of them is wrong."""
    from pydantic import ValidationError

    from mlx_server.config import Settings

    try:
        return Settings.load(config, **flags)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise CommandError(f"setting {name}: {first['msg']}") from error
    except OSError as error:
        raise CommandError(f"--config: {error}") from error
    except ValueError as error:
        # The file is not TOML, or a variable that holds a list is not JSON.
        raise CommandError(f"settings cannot be read: {error}") from error


# models


def _catalog_with_models(settings: "Settings") -> "Catalog":
    """The catalog, with every model that the operator named resolved, fetched if need be."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.hub import can_pull

    catalog = Catalog(settings)
    for name in settings.models:
        try:
            catalog.add(name)
        except ModelNotFound:
            if not can_pull(name, settings):
                raise
            _pull(name, settings)
            catalog.add(name)
    return catalog


def _pull(name: str, settings: "Settings") -> Path:
    """Fetch `name` behind a progress bar."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from mlx_server.models.store import hub as download

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    if quiet:
        print(f"fetching {name}", file=sys.stderr, flush=True)
    with Progress(text, *columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("Starting", total=None)

        def show(progress: download.Progress) -> None:
            total = progress.total or None
            bar.update(task, description=progress.stage, completed=progress.done, total=total)

        return download.pull(name, settings, show)


# listening

Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def _addresses(settings: "Settings") -> list[Address]:
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise CommandError(f"setting host: {settings.host!r} is no address here") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _require_key(settings: "Settings", addresses: list[Address]) -> None:
    from mlx_server.keys import KeyRing, KeysError

    try:
        keys = KeyRing.load(settings)
    except KeysError as error:
        raise CommandError(str(error)) from error
    local = all(ip_address(str(address[0]).split("%")[0]).is_loopback for _, address in addresses)
    if local or keys.guards("inference") or settings.allow_no_key:
        return
    raise CommandError(
        f"listening on {settings.host} lets other machines in, and no API key is set:"
        " give --api-key KEY or a keys_file, or --allow-no-key if that is what you want"
    )


def _bind(settings: "Settings", addresses: list[Address]) -> list[socket.socket]:
    """Sockets bound to the addresses, all with the same port, not yet listening.

    Taken before any model is loaded, so that a port in use is known at once.
    """
    sockets: list[socket.socket] = []
    port = settings.port
    for family, (name, _, *rest) in addresses:
        try:
            sockets.append(_bound(family, (name, port, *rest)))
        except OSError as error:
            # `localhost` stands for an IPv6 address too, also where IPv6 is switched off.
            if len(addresses) > 1 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            raise CommandError(
                f"cannot listen on {settings.host} port {port}: {error.strerror}"
            ) from error
        port = sockets[-1].getsockname()[1]
    if not sockets:
        raise CommandError(f"setting host: {settings.host!r} is no address of this machine")
    return sockets


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. The system's own default holds megabytes of what nobody reads.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _run(settings: "Settings", catalog: "Catalog", sockets: list[socket.socket]) -> None:
    from mlx_server.events import setup_logging
    from mlx_server.main import create_app
    from mlx_server.server import Server, allow_open_files

    setup_logging(settings.log_level)
    # The server has its own handlers once it runs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    allow_open_files(settings)

    def greet() -> None:
        print(_greeting(settings), flush=True)

    try:
        Server(create_app(settings, catalog), settings, greet).run(sockets)
    except OSError as error:
        # Two processes can have bound the port, until one listens.
        raise CommandError(f"the server cannot start: {error}") from error


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _greeting(settings: "Settings") -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    models = ", ".join(settings.models) or "on demand"
    return f"mlx-server {__version__} answers at http://{host}:{settings.port} (models: {models})"
