"""The `mlx-server` command. Commands import slow modules themselves: help is quick."""

import os
import sys
from typing import Annotated, Literal

import typer

from mlx_server.cli import config_commands
from mlx_server.cli.bench.command import bench
from mlx_server.cli.chat.command import chat
from mlx_server.cli.doctor.command import doctor
from mlx_server.cli.launch.command import launch
from mlx_server.cli.model_commands import list_models, rm
from mlx_server.cli.options import CommandError, complain
from mlx_server.cli.ps import ps
from mlx_server.cli.pull import pull
from mlx_server.cli.serve import serve
from mlx_server.cli.service import command as service
from mlx_server.cli.worker import worker
from mlx_server.errors import ServerError

FOLDERS = ("HOME", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")
"""How the names of variables begin that libraries take for folders."""
NOWHERE = "/nonexistent"

app = typer.Typer(
    help="Serve MLX language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The short help is what lists of commands have room for.
app.command(short_help="Start the server.")(serve)
app.command(short_help="Talk with a model.")(chat)
app.command("list", short_help="Show the models on this machine.")(list_models)
app.command(short_help="Show the models that a server holds.")(ps)
app.command(short_help="Run an agent or a client with a model.")(launch)
app.command(short_help="Fetch models.")(pull)
app.command(short_help="Remove models from the disk.")(rm)
app.command(short_help="Take ranks and replicas of a server's models.")(worker)
app.command(short_help="Measure how fast a server answers.")(bench)
app.command(short_help="Check the machine and the installation.")(doctor)
app.add_typer(config_commands.app, name="config", short_help="Show the settings, or write a file.")
app.add_typer(service.app, name="service", short_help="Run the server in the background.")


def main() -> None:
    _mend_environment()
    try:
        app()
    except (CommandError, ServerError) as error:
        complain(str(error))
        sys.exit(1)
    finally:
        _flush()


def _flush() -> None:
    """Whoever reads the output may have gone, which is no reason for a traceback at the end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _mend_environment() -> None:
    """Libraries take an empty folder for the working directory, and fail for a user whose home is
    nowhere, as in many containers.
    """
    for name in [name for name, value in os.environ.items() if not value]:
        if name.startswith(FOLDERS):
            del os.environ[name]
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = NOWHERE


@app.command(short_help="Print a shell's completions.")
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument()],
) -> None:
    """Print what a shell reads to complete commands, options and models' names.

    For bash, `eval "$(mlx-server completion bash)"` in ~/.bashrc; for zsh, the same in ~/.zshrc
    after compinit; for fish, `mlx-server completion fish | source` in its config.fish.
    """
    from typer.completion import (  # type: ignore[attr-defined]
        get_completion_script,
    )

    print(
        get_completion_script(
            prog_name="mlx-server", complete_var="_MLX_SERVER_COMPLETE", shell=shell
        )
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        from mlx_server.cli.versions import version_line

        print(version_line())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Serve MLX language models."""
