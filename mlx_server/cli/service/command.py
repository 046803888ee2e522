"""`service`: the server as launchd or systemd runs it for this user."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_server.cli.options import (
    CommandError,
    ConfigOption,
    JsonOption,
    load_settings,
    print_json,
)
from mlx_server.cli.service.managers import Manager, log_file, manager
from mlx_server.cli.service.units import Service
from mlx_server.errors import reason

KEPT = ("HF_", "HUGGINGFACE_", "MLX_", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "OTEL_")
"""How the names of variables begin that the server reads, and that a service would lack."""

app = typer.Typer(
    help="Run the server in the background, from login on, and again after failures.",
    no_args_is_help=True,
)


@app.command(short_help="Install the service and start it.")
def install(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="ID", help="Load this model at start. Repeatable."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Its port.")] = None,
    config: ConfigOption = None,
) -> None:
    """Install the service, or replace it, and start it. Its settings are the file's, and the
    variables that are set now.
    """
    settings = load_settings(config, port=port)
    options = [part for name in model or () for part in ("--model", name)]
    options += ["--port", str(port)] if port is not None else []
    options += ["--config", str(config.resolve())] if config else []
    command = [sys.executable, "-m", "mlx_server", "serve", *options]
    ours = manager()
    ours.install(Service(command, log_file(), _environment()))
    print(f"The service is installed in {ours.file} and listens on port {settings.port}.")
    if sys.platform.startswith("linux"):
        print("`loginctl enable-linger` lets it run while you are not logged in.")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    return {"PATH": os.environ.get("PATH", os.defpath)} | kept


@app.command(short_help="Stop the service and remove it.")
def remove() -> None:
    """Stop the service and remove it; models and settings stay."""
    ours = _installed()
    ours.remove()
    print(f"The service is removed from {ours.file}.")


@app.command(short_help="Show what the system says of it.")
def status(as_json: JsonOption = False) -> None:
    """Show what the system says of the service."""
    ours = manager()
    said = ours.status().strip() if ours.file.exists() else None
    if as_json:
        print_json({"installed": said is not None, "file": ours.file, "status": said})
    elif said is None:
        print("The service is not installed: `mlx-server service install` does that.")
    else:
        print(said)


@app.command()
def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, until Ctrl-C.")] = False,
) -> None:
    """Show the end of the service's log."""
    command = _installed().logs_command(follow)
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise CommandError(f"{command[0]} cannot be run: {reason(error)}") from error


def _installed() -> Manager:
    ours = manager()
    if not Path(ours.file).exists():
        raise CommandError("the service is not installed: `mlx-server service install` does that")
    return ours
