"""`bench`: how fast a server answers, and what limits it."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_server.cli.bench.figures import Level
from mlx_server.cli.completing import complete_model
from mlx_server.cli.options import (
    CommandError,
    ConfigOption,
    HostOption,
    JsonOption,
    KeyOption,
    PortOption,
    complain,
    print_json,
)
from mlx_server.cli.remote import Remote, choose_model, find_remote, named_remote
from mlx_server.cli.tables import Column, table
from mlx_server.cli.terminal import quiet_keyboard

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlx_server.cli.bench.load import Load

BAR = 40
FIGURES = 22
"""Columns beside the bars."""


def bench(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="ID", autocompletion=complete_model),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Any server that speaks OpenAI's API.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Streams at once, level by level.")
    ] = "1,2,4,8,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About so many.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, at most.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Of each stream at each level.")] = 2,
    as_json: JsonOption = False,
    host: HostOption = None,
    port: PortOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Measure a server: throughput and latencies by concurrency, and what limits it."""
    from rich.console import Console

    from mlx_server.cli.bench.limits import verdict
    from mlx_server.cli.bench.load import Load

    counts = _counts(concurrency)
    remote = named_remote(url, api_key) if url else find_remote(host, port, api_key, config)
    load = Load(choose_model(remote, model), prompt_tokens, max_tokens, requests)
    console = Console(highlight=False)
    levels = _sweep(remote, load, counts)
    conclusion = verdict(levels) if levels else "nothing was measured"
    if as_json:
        facts = {"url": remote.url, "model": load.model, "levels": [asdict(one) for one in levels]}
        print_json(facts | {"limit": conclusion})
    elif levels:
        console.print(_table(levels, console.width))
        console.print()
        _plot(console, levels)
        console.print()
        console.print(f"What limits it: {conclusion}", markup=False)
    if len(levels) < len(counts):
        raise typer.Exit(130)


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise CommandError(f"--concurrency {text!r} is no list such as 1,4,16") from error
    if counts[0] < 1:
        raise CommandError("--concurrency counts from 1")
    return counts


def _sweep(remote: Remote, load: "Load", counts: list[int]) -> list[Level]:
    """Ctrl-C ends it with the levels that are done. Raises Unavailable if the model cannot be
    asked at all.
    """
    from rich.console import Console

    from mlx_server.cli.bench.load import first_body, run_level

    console = Console(stderr=True, highlight=False)
    levels: list[Level] = []
    try:
        with quiet_keyboard(), console.status("") as status:
            status.update(f"asking {load.model} for a first answer")
            for _ in remote.stream("/v1/chat/completions", first_body(load)):
                pass  # It warms up, and may have to load.
            for count in counts:
                status.update(f"{load.model}: {count} {'streams' if count > 1 else 'stream'}")
                levels.append(asyncio.run(run_level(remote, load, count)))
    except KeyboardInterrupt:
        complain("stopped")
    return levels


def _table(levels: list[Level], width: int) -> "Table":
    def column(name: str, rank: int, cell: Callable[[Level], str]) -> Column:
        return Column(name, [cell(level) for level in levels], rank, number=True)

    columns = [
        column("Streams", 0, lambda level: str(level.concurrency)),
        column("Tokens/s", 0, lambda level: f"{level.output_rate:,.1f}"),
        column("Input/s", 4, lambda level: f"{level.input_rate:,.0f}"),
        column("TTFT p50", 1, lambda level: _milliseconds(level.ttft_p50)),
        column("p95", 5, lambda level: _milliseconds(level.ttft_p95)),
        column("ITL p50", 2, lambda level: _milliseconds(level.itl_p50)),
        column("p95", 6, lambda level: _milliseconds(level.itl_p95)),
        column("Failed", 3, lambda level: str(len(level.errors))),
    ]
    return table(columns, width)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def _plot(console: "Console", levels: list[Level]) -> None:
    """Tokens per second by concurrency."""
    from rich.bar import Bar
    from rich.table import Table

    most = max(level.output_rate for level in levels) or 1.0
    room = max(1, min(BAR, console.width - FIGURES))
    plot = Table(box=None, pad_edge=False, header_style="bold")
    plot.add_column("Streams", justify="right")
    plot.add_column("Tokens/s", width=room)
    plot.add_column("", justify="right")
    for level in levels:
        bar = Bar(most, 0, level.output_rate, width=room)
        plot.add_row(str(level.concurrency), bar, f"{level.output_rate:,.1f}")
    console.print(plot)
