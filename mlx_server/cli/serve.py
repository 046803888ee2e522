"""`serve`: listen, resolve the models named by the operator, run the server."""

import asyncio
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from typer import Option

from mlx_server.cli.completing import complete_model
from mlx_server.cli.options import CommandError, ConfigOption, load_settings
from mlx_server.cli.pull import fetch_with_bar
from mlx_server.cli.sockets import Address, PortInUse, advice_on, bind, find_addresses, is_local
from mlx_server.errors import ModelNotFound, reason
from mlx_server.starting import for_good

if TYPE_CHECKING:
    import socket

    from mlx_server.config import Settings
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.server import Server


def serve(
    model: Annotated[
        list[str] | None,
        Option(
            "--model",
            "-m",
            metavar="ID|PATH",
            help="Load this model at start. Repeatable.",
            autocompletion=complete_model,
        ),
    ] = None,
    host: Annotated[str | None, Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, Option(help="Port; 0 takes a free one (default 8000).")] = None,
    ollama_port: Annotated[
        int | None, Option(help="A second port, for programs that look for Ollama: 11434.")
    ] = None,
    api_key: Annotated[
        list[str] | None, Option(metavar="KEY", help="A key that callers must show. Repeatable.")
    ] = None,
    allow_no_key: Annotated[
        bool, Option("--allow-no-key", help="Listen beyond this machine without a key.")
    ] = False,
    model_dir: Annotated[
        list[Path] | None,
        Option(metavar="FOLDER", help="A folder of MLX model folders. Repeatable."),
    ] = None,
    max_batch: Annotated[
        int | None, Option(help="Requests decoded together per model (default 32).")
    ] = None,
    memory_limit: Annotated[
        str | None, Option(help="Memory for models: a share, or bytes like 12GB (default 80%).")
    ] = None,
    context_length: Annotated[
        int | None, Option(help="Caps every model's context, in tokens.")
    ] = None,
    kv_bits: Annotated[
        int | None, Option(help="Quantize KV caches to 8 or 4 bits (default: do not).")
    ] = None,
    dequantize: Annotated[
        str | None, Option(help="Dequantize weights at load: auto, always, never.")
    ] = None,
    draft_model: Annotated[
        str | None,
        Option(
            metavar="ID|PATH",
            help="A small model that guesses tokens for the others.",
            autocompletion=complete_model,
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        Option(help="Engines that serve each model (default 1), with workers one on a machine."),
    ] = None,
    ranks: Annotated[
        int | None,
        Option(help="Processes that share a model (default 1, with workers one on each machine)."),
    ] = None,
    division: Annotated[
        str | None, Option(help="What each of them gets of it: auto, tensor, pipeline.")
    ] = None,
    worker: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="A machine that takes a rank or replica of each model, or is a spare. Repeatable.",
        ),
    ] = None,
    hosts: Annotated[
        Path | None,
        Option(metavar="FILE", help="MLX's file of hosts, which are workers, started over ssh."),
    ] = None,
    log_level: Annotated[
        str | None, Option(help="debug, info, warning or error (default info).")
    ] = None,
    log_file: Annotated[
        Path | None, Option(metavar="FILE", help="Log to a file, which rotates, instead.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Start the server."""
    flags = {
        "models": model or None,
        "host": host,
        "port": port,
        "ollama_port": ollama_port,
        "api_keys": api_key or None,
        "allow_no_key": allow_no_key or None,
        "model_dirs": model_dir or None,
        "max_batch": max_batch,
        "memory_limit": memory_limit,
        "context_length": context_length,
        "kv_bits": kv_bits,
        "dequantize": dequantize,
        "draft_model": draft_model,
        "replicas": replicas,
        "ranks": ranks,
        "division": division,
        "workers": worker or None,
        "hosts_file": hosts,
        "log_level": log_level,
        "log_file": log_file,
    }
    with for_good():
        settings = load_settings(config, **flags)
    _serve(settings, partial(_reread, config, flags))


def _reread(config: Path | None, flags: dict[str, Any]) -> "Settings":
    from mlx_server.config import Settings

    return Settings.load(config, **flags)


def _serve(settings: "Settings", reread: Callable[[], "Settings"]) -> None:
    addresses = find_addresses(settings.host, settings.port)
    _require_key(settings, addresses)
    # Before loading, so that a port in use is reported at once.
    sockets = _bound(settings.host, settings.port, addresses)
    settings = settings.model_copy(update={"port": sockets[0].getsockname()[1]})
    if settings.ollama_port is not None:
        more = _bound(settings.host, settings.ollama_port, addresses)
        settings = settings.model_copy(update={"ollama_port": more[0].getsockname()[1]})
        sockets += more
    _run(settings, catalog_with_models(settings), sockets, reread)


def _bound(host: str, port: int, addresses: list[Address]) -> list["socket.socket"]:
    try:
        return bind(host, port, addresses)
    except PortInUse as error:
        raise CommandError(f"{error}. {advice_on(port)}") from error


def _require_key(settings: "Settings", addresses: list[Address]) -> None:
    from mlx_server.keys import KeyRing, KeysError

    try:
        keys = KeyRing.load(settings.api_keys, settings.admin_keys, settings.keys_file)
    except KeysError as error:
        raise CommandError(str(error)) from error
    if is_local(addresses) or keys.guards("inference") or settings.allow_no_key:
        return
    raise CommandError(
        f"listening on {settings.host} lets other machines in, and no API key is set:"
        " give --api-key KEY or a keys_file, or --allow-no-key if that is what you want"
    )


def catalog_with_models(settings: "Settings") -> "Catalog":
    """Fetches those of `settings.models`, and draft models, that are not here."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.fetch import can_fetch
    from mlx_server.models.store.sources import ModelSources

    sources = ModelSources.of(settings)
    catalog = Catalog(sources)
    for name in (*settings.models, *settings.draft_models):
        try:
            catalog.add(name)
        except ModelNotFound:
            if not can_fetch(name, sources.aliases):
                raise
            fetch_with_bar(name, sources)
            catalog.add(name)
    return catalog


def _run(
    settings: "Settings",
    catalog: "Catalog",
    sockets: list["socket.socket"],
    reread: Callable[[], "Settings"],
) -> None:
    from mlx_server.events import setup_logging

    try:
        setup_logging(
            settings.log_level, settings.log_format, settings.log_levels, settings.log_file
        )
    except OSError as error:
        raise CommandError(f"setting log_file: {reason(error)}") from error
    # Until the server installs its own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    with for_good():
        server = _server(settings, catalog, reread)
    try:
        server.run(sockets)
    except OSError as error:
        # Two processes can bind a port until one listens.
        raise CommandError(f"the server cannot start: {reason(error)}") from error


def _server(settings: "Settings", catalog: "Catalog", reread: Callable[[], "Settings"]) -> "Server":
    from mlx_server.api.http.connection import ConnectionLimits
    from mlx_server.cli.greeting import Greeting, print_greeting, show_loading
    from mlx_server.main import create_app
    from mlx_server.models.pool.manager import ModelPoolManager
    from mlx_server.server import Server, raise_open_file_limit

    raise_open_file_limit(settings.max_connections)
    app = create_app(settings, catalog, reread=reread)
    pool: ModelPoolManager = app.state.pool

    async def greet() -> None:
        known = await asyncio.to_thread(catalog.entries)
        greeting = Greeting(settings, len(known))
        print_greeting(greeting, pool)
        await show_loading(pool)

    return Server(app, ConnectionLimits.of(settings), settings.grace_period, greet)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)
