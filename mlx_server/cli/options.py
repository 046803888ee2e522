"""Options, settings and errors shared by commands."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mlx_server.errors import reason

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

FIELD = re.compile(r'for field "(\w+)"')
WORD = re.compile(r"(?:`[^`]*`|\S)+")


class CommandError(Exception):
    """Ends the command with its message as one line."""


def complain(message: str) -> None:
    """To standard error: one line, which a terminal gets folded between words."""
    line = f"mlx-server: {' '.join(message.split())}"
    if sys.stderr.isatty():
        line = folded(line, shutil.get_terminal_size().columns)
    print(line, file=sys.stderr, flush=True)


def folded(text: str, width: int) -> str:
    """Lines of whole words; what is in backquotes is one, since it is there to be copied."""
    lines = [""]
    for word in WORD.findall(text):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if len(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def load_settings(config: Path | None, **flags: Any) -> "Settings":
    """Raises CommandError, which names the first wrong setting."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from mlx_server.config import Settings

    try:
        return Settings.load(config, **flags)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise CommandError(f"setting {name}: {first['msg']}") from error
    except OSError as error:
        raise CommandError(f"the settings file cannot be read: {reason(error)}") from error
    except SettingsError as error:
        raise CommandError(_no_json(str(error))) from error
    except ValueError as error:
        # No TOML.
        raise CommandError(f"settings cannot be read: {error}") from error


def _no_json(said: str) -> str:
    """Of pydantic's words on a variable that holds a list or a table."""
    from mlx_server.config import Settings

    field = FIELD.search(said)
    if field is None:
        return f"settings cannot be read: {said}"
    default = Settings.model_fields[field[1]].get_default(call_default_factory=True)
    example = '{"NAME": "VALUE"}' if isinstance(default, dict) else '["ONE", "TWO"]'
    return f"MLX_SERVER_{field[1].upper()} is no JSON: it wants such as `{example}`"


def print_json(value: Any) -> None:
    """To be read by programs: one document, whatever the terminal."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"
