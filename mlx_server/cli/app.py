"""The `mlx-server` command. Commands import slow modules themselves: help is quick."""

import os
import sys
from typing import Annotated

import typer

from mlx_server import __version__
from mlx_server.cli.launch.command import launch
from mlx_server.cli.model_commands import list_models, pull, rm
from mlx_server.cli.options import CommandError
from mlx_server.cli.ps import ps
from mlx_server.cli.serve import serve
from mlx_server.errors import ServerError

FOLDERS = ("HOME", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")
"""How the names of variables begin that libraries take for folders."""
NOWHERE = "/nonexistent"

app = typer.Typer(
    help="Serve MLX language models over the OpenAI API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(pull)
app.command("list")(list_models)
app.command()(ps)
app.command()(launch)
app.command()(rm)


def main() -> None:
    _mend_environment()
    try:
        app()
    except (CommandError, ServerError) as error:
        message = " ".join(str(error).split())
        print(f"mlx-server: {message}", file=sys.stderr)
        sys.exit(1)


def _mend_environment() -> None:
    """Libraries take an empty folder for the working directory, and fail for a user whose home is
    nowhere, as in many containers.
    """
    for name in [name for name, value in os.environ.items() if not value]:
        if name.startswith(FOLDERS):
            del os.environ[name]
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = NOWHERE


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
