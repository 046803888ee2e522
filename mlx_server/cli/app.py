"""The `mlx-server` command. Commands import slow modules themselves: help is quick."""

import os
import sys
from typing import Annotated

import typer

from mlx_server import __version__
from mlx_server.cli.model_commands import list_models, pull, rm
from mlx_server.cli.options import CommandError
from mlx_server.cli.ps import ps
from mlx_server.cli.serve import serve
from mlx_server.errors import ServerError

app = typer.Typer(
    help="Serve MLX language models over the OpenAI API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(pull)
app.command("list")(list_models)
app.command()(ps)
app.command()(rm)


LIBRARIES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")


def main() -> None:
    _unset_empty_variables()
    try:
        app()
    except (CommandError, ServerError) as error:
        message = " ".join(str(error).split())
        print(f"mlx-server: {message}", file=sys.stderr)
        sys.exit(1)


def _unset_empty_variables() -> None:
    """As with our own: libraries take an empty folder for the working directory."""
    for name in [name for name, value in os.environ.items() if not value]:
        if name.startswith(LIBRARIES):
            del os.environ[name]


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
