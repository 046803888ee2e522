"""`config`: the settings in force, where each came from, and a file of all of them."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_server.cli.options import (
    CommandError,
    ConfigOption,
    JsonOption,
    load_settings,
    print_json,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

WIDTH = 96
MASK = "********"

app = typer.Typer(help="Show the settings in force, or write a file of them.")


@app.callback(invoke_without_command=True)
def show(
    context: typer.Context,
    changed: Annotated[bool, typer.Option("--changed", help="Only those that were set.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show every setting, its value and where it came from."""
    if context.invoked_subcommand is not None:
        return
    values = load_settings(config).model_dump(mode="json")
    origins = origins_of(config)
    names = [name for name in values if not changed or name in origins]
    if as_json:
        facts = {
            name: {"value": _masked(values[name]), "from": origins.get(name, "default")}
            for name in names
        }
        print_json(facts)
        return
    if not names:
        print("Nothing is set: every setting has its default.")
        return
    _print_table([(name, _masked(values[name]), origins.get(name, "")) for name in names])


def _print_table(rows: list[tuple[str, Any, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("Setting", "Value", "From", box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"
    table.columns[2].overflow = "fold"
    for name, value, origin in rows:
        shown = "unset" if value is None else json.dumps(value, ensure_ascii=False)
        style = "" if origin else "dim"
        table.add_row(name, shown, origin or "default", style=style)
    Console(highlight=False, markup=False).print(table)


def _masked(value: Any) -> Any:
    """Secrets come as asterisks from pydantic, as many as it likes."""
    if isinstance(value, list):
        return [_masked(one) for one in value]
    return MASK if isinstance(value, str) and value and not value.strip("*") else value


def origins_of(config: Path | None) -> dict[str, str]:
    """The variable or file that each setting comes from; those with defaults are absent."""
    from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

    from mlx_server.config import Settings, present_default_file

    file = config or present_default_file()
    given = TomlConfigSettingsSource(Settings, file)() if file else {}
    found = {name: str(file) for name in given}
    variables = {name.upper() for name, value in os.environ.items() if value}
    for name in EnvSettingsSource(Settings)():
        variable = f"MLX_SERVER_{name.upper()}"
        # A table may be given entry by entry.
        nested = sorted(one for one in variables if one.startswith(f"{variable}__"))
        found[name] = ", ".join(["$" + one for one in (variable, *nested) if one in variables])
    return found


@app.command(short_help="Write a file of all settings.")
def init(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="By default the one that is read by itself."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a file of all settings with their meaning, each commented out."""
    from mlx_server.config import default_file

    target = file or default_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w" if force else "x", encoding="utf-8") as output:
            output.write(commented_file())
    except FileExistsError as error:
        raise CommandError(f"{target} is there already; --force replaces it") from error
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error.strerror}") from error
    read = "it is read by itself" if target == default_file() else f"use it with --config {target}"
    print(f"{target} is written; {read}.")


def commented_file() -> str:
    """TOML that changes nothing until lines are uncommented. Tables come last, as TOML wants."""
    from mlx_server.config import Settings

    fields = Settings.model_fields.items()
    lines = ["# Settings of mlx-server. Uncomment what you change; `mlx-server config` shows all."]
    tables = [name for name, field in fields if isinstance(_default(field), dict)]
    for name, field in fields:
        if name not in tables:
            lines += ["", *_comment(field), f"#{name} = {_toml(_default(field))}"]
    for name in tables:
        lines += ["", *_comment(Settings.model_fields[name]), f"#[{name}]", '#"NAME" = "VALUE"']
    return "\n".join(lines) + "\n"


def _comment(field: "FieldInfo") -> list[str]:
    import textwrap

    unset = " Unset by default." if _default(field) is None else ""
    return [f"# {line}" for line in textwrap.wrap(f"{field.description}{unset}", WIDTH)]


def _default(field: "FieldInfo") -> Any:
    return field.get_default(call_default_factory=True)


def _toml(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's."""
    return '""' if value is None else json.dumps(value, default=str)
