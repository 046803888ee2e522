"""Options, settings and errors shared by commands."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

if TYPE_CHECKING:
    from mlx_server.config import Settings

ConfigOption = Annotated[
    Path | None,
    Option(
        "--config",
        metavar="FILE",
        help="Settings in TOML (default ~/.mlx-server/config.toml).",
    ),
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
HostOption = Annotated[str | None, Option("--host", help="Where the server listens.")]
PortOption = Annotated[int | None, Option("--port", help="Its port.")]
KeyOption = Annotated[
    str | None, Option("--api-key", metavar="KEY", help="A key, if it asks for one.")
]


class CommandError(Exception):
    """Ends the command with its message as one line."""


def load_settings(config: Path | None, **flags: Any) -> "Settings":
    """Raises CommandError, which names the first wrong setting."""
    from pydantic import ValidationError

    from mlx_server.config import Settings

    try:
        return Settings.load(config, **flags)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise CommandError(f"setting {name}: {first['msg']}") from error
    except OSError as error:
        raise CommandError(f"the settings file cannot be read: {error}") from error
    except ValueError as error:
        # No TOML, or a list variable that is no JSON.
        raise CommandError(f"settings cannot be read: {error}") from error


def print_json(value: Any) -> None:
    """To be read by programs: one document, whatever the terminal."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"
