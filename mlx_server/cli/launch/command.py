"""`launch`: run a program with a model of this server."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from typer import Argument, Option

from mlx_server.cli.options import CommandError, ConfigOption, complain, load_settings
from mlx_server.errors import reason

if TYPE_CHECKING:
    from mlx_server.cli.launch.program import Program, Setup
    from mlx_server.cli.launch.servers import Offer
    from mlx_server.config import Settings

SHOWN_FOLDER = Path("TEMPORARY-FOLDER")


def launch(
    program: Annotated[
        str, Argument(help="claude, codex, opencode, aider, qwen, llm or open-webui.")
    ],
    arguments: Annotated[
        list[str] | None, Argument(metavar="[-- ARGS]...", help="The program's own arguments.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", "-m", metavar="ID", help="The model that it shall use.")
    ] = None,
    show: Annotated[
        bool, Option("--print", help="Show what would be set, and run nothing.")
    ] = False,
    host: Annotated[str | None, Option(help="Where a server listens.")] = None,
    port: Annotated[int | None, Option(help="Its port.")] = None,
    api_key: Annotated[
        str | None, Option(metavar="KEY", help="A key, if the server asks for one.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Run a program with a model of this server, which is started if none runs."""
    from mlx_server.cli.launch import servers
    from mlx_server.cli.launch.choosing import advice, chosen, target_of

    known = _known(program)
    executable = None if show else _executable(known)
    settings = load_settings(config, host=host, port=port)
    server = servers.configured(settings, api_key)
    running = servers.offers_of(server)
    if running is None and (host, port, api_key) != (None, None, None):
        raise CommandError(f"no mlx-server answers at {server.url}")
    offer = chosen(_local_offers(settings, model) if running is None else running, model)
    if hint := advice(known, offer):
        complain(hint)
    given = tuple(arguments or ())
    if executable is None:
        _show(known, known.set_up(target_of(server, offer), SHOWN_FOLDER), given)
        return
    folder = Path(tempfile.mkdtemp(prefix="mlx-server-launch-"))
    serve = [] if running is not None else servers.serve_command(model or offer.id, config)
    # It cleans up, whatever becomes of this process.
    servers.start_keeper(folder, serve)
    if running is None:
        complain(f"starting a server with {offer.id}")
        server = servers.started(folder, server.key)
    setup = known.set_up(target_of(server, offer), folder)
    _write(setup, folder)
    _become(executable, (*setup.arguments, *given), setup.environment)


def _known(name: str) -> "Program":
    from mlx_server.cli.launch.programs import PROGRAMS

    if name not in PROGRAMS:
        raise CommandError(f"launch does not know {name!r}, but {', '.join(PROGRAMS)}")
    return PROGRAMS[name]


def _executable(program: "Program") -> str:
    found = shutil.which(program.executable)
    if found is None:
        raise CommandError(
            f"{program.title} is not installed, or not on the PATH: `{program.install}` installs it"
        )
    return found


def _local_offers(settings: "Settings", model: str | None) -> "list[Offer]":
    """What a server that is started here could serve: `model`, fetched if need be, or all."""
    from mlx_server.cli.launch.servers import Offer
    from mlx_server.cli.serve import catalog_with_models

    named = [model] if model else settings.models
    catalog = catalog_with_models(settings.model_copy(update={"models": named}))
    entries = [catalog.find(model)] if model else catalog.entries()
    return [
        Offer(entry.id, entry.context_within(settings.context_length), aliases=entry.aliases)
        for entry in entries
        if not entry.embeds
    ]


def _show(program: "Program", setup: "Setup", arguments: tuple[str, ...]) -> None:
    """The files, then lines for a shell."""
    import shlex

    for name, place in setup.links.items():
        print(f"# {SHOWN_FOLDER / name} is a link to {place}")
    for name, content in setup.files.items():
        print(f"# {SHOWN_FOLDER / name} is:\n{content}\n")
    for name, value in setup.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join([program.executable, *setup.arguments, *arguments]))


def _write(setup: "Setup", folder: Path) -> None:
    for name, content in setup.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    for name, place in setup.links.items():
        (folder / name).symlink_to(place)


def _become(executable: str, arguments: tuple[str, ...], own: "Mapping[str, str]") -> NoReturn:
    """This process is the program from now on: signals, terminal and exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these, which a program would inherit.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(executable, [executable, *arguments], os.environ | own)
    except OSError as error:
        raise CommandError(f"{executable} cannot be run: {reason(error)}") from error
