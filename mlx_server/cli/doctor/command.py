"""`doctor`: what works here, what does not, and how to mend it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_server.cli.doctor.finding import Finding
from mlx_server.cli.options import (
    ConfigOption,
    HostOption,
    JsonOption,
    PortOption,
    complain,
    load_settings,
    print_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_server.config import Settings

SIGNS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


def doctor(
    as_json: JsonOption = False,
    host: HostOption = None,
    port: PortOption = None,
    hosts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="MLX's file of hosts: check these and the links between them."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="ID|PATH",
            help="With --hosts: compare this model's files. Repeatable.",
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Check the machine, the installation, folders, models, port and hub; or other machines."""
    from rich.console import Console

    console = Console(highlight=False)
    findings = []
    settings = load_settings(config, host=host, port=port)
    checks = _of_hosts(settings, hosts, model or []) if hosts else _findings(settings)
    for finding in checks:
        findings.append(finding)
        if as_json:
            continue
        console.print(_lines(finding))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    failed = sum(finding.verdict == "fail" for finding in findings)
    if failed:
        complain(f"{failed} of {len(findings)} checks failed")
        raise typer.Exit(1)


def _lines(finding: Finding) -> "Table":
    from rich.table import Table
    from rich.text import Text

    sign, style = SIGNS[finding.verdict]
    lines = Table.grid(padding=(0, 1))
    lines.add_column(width=4)
    lines.add_column(width=11)
    lines.add_row(Text(sign, style), Text(finding.check, "bold"), Text(finding.detail))
    if finding.fix:
        lines.add_row("", "", Text(f"→ {finding.fix}", "cyan"))
    return lines


def _of_hosts(settings: "Settings", file: Path, models: list[str]) -> Iterator[Finding]:
    from mlx_server.cli.doctor import hosts, machine

    yield machine.versions()
    yield from hosts.hosts(settings, file, models or settings.models)


def _findings(settings: "Settings") -> Iterator[Finding]:
    """Each as soon as it is known."""
    from mlx_server.cli.doctor import machine, surroundings

    yield machine.versions()
    yield from machine.device(settings)
    yield machine.open_files(settings)
    yield surroundings.disk(settings)
    yield from surroundings.models(settings)
    yield surroundings.port(settings)
    yield surroundings.hub()
