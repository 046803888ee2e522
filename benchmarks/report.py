"""What a run says: a table on the terminal, a JSON file, a plot and a section of Markdown."""

import datetime
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.measures import Cell, Measurement, Sample, Spread
from mlx_server import __version__

_PACKAGES = ("mlx", "mlx-lm", "fastapi", "uvicorn")


class Report(msgspec.Struct, frozen=True):
    """One run of the benchmark."""

    title: str
    settings: dict[str, str]
    machine: dict[str, str]
    measurements: list[Measurement]

    def cells(self) -> list[Cell]:
        """The measured cells, in the order in which they were measured."""
        return list(dict.fromkeys(m.cell for m in self.measurements))

    def servers(self) -> list[str]:
        """The measured servers, in the order in which they were measured."""
        return list(dict.fromkeys(m.server for m in self.measurements))

    def samples(self, cell: Cell, server: str) -> dict[int, Sample]:
        """The samples of one server in one cell, by round."""
        return {
            m.round: m.sample for m in self.measurements if m.cell == cell and m.server == server
        }


@dataclass(frozen=True)
class Column:
    """One figure of a sample, and how it is shown."""

    heading: str
    value: Callable[[Sample], float | None]
    digits: int


_COLUMNS = [
    Column("tokens/s", lambda sample: sample.tokens_per_s, 1),
    Column("decode tokens/s", lambda sample: sample.decode_tokens_per_s, 1),
    Column("TTFT p50 s", lambda sample: sample.ttft_p50, 2),
    Column("TTFT p99 s", lambda sample: sample.ttft_p99, 2),
    Column("ITL p50 ms", lambda sample: _milliseconds(sample.itl_p50), 0),
    Column("ITL p99 ms", lambda sample: _milliseconds(sample.itl_p99), 0),
]
_HEADINGS = [
    "cell",
    "server",
    *(column.heading for column in _COLUMNS),
    "tokens (short)",
    "ours/this",
    "decode ours/this",
]


def machine() -> dict[str, str]:
    """The machine and the versions that the figures were measured with."""
    memory = psutil.virtual_memory().total / 2**30
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "cpu": _cpu_model(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx-server": __version__,
    } | versions


def print_table(report: Report, console: Console) -> None:
    """Median (min-max) over the rounds, one row a cell and server."""
    table = Table(title=report.title)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right")
    for cell in report.cells():
        for server in report.servers():
            # The spread goes under the median: eleven columns are wide enough as it is.
            table.add_row(*(entry.replace(" (", "\n(") for entry in _row(report, cell, server)))
        table.add_section()
    console.print(table)


def write_json(report: Report, path: Path) -> None:
    """Every sample, with the settings and the machine."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def write_plot(report: Report, path: Path) -> None:
    """Tokens/s and inter-token latency over the streams, one row of plots a sampling mode."""
    modes = list(dict.fromkeys(cell.mode for cell in report.cells()))
    figure = Figure(figsize=(11, 4 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), 2, squeeze=False)
    for mode, (speed, latency) in zip(modes, axes, strict=True):
        cells = [cell for cell in report.cells() if cell.mode == mode]
        for server in report.servers():
            _draw(speed, report, cells, server, _COLUMNS[0])
            _draw(latency, report, cells, server, _COLUMNS[4])
        speed.set(title=f"{mode}: throughput", xlabel="streams", ylabel="tokens/s", ylim=(0, None))
        latency.set(title=f"{mode}: latency", xlabel="streams", ylabel="ITL p50, ms")
        latency.set_ylim(0, None)
        speed.legend()
    figure.suptitle(report.title)
    figure.savefig(path, dpi=120)


def write_markdown(report: Report, path: Path) -> None:
    """Puts the run's section into `path`, in place of an older one with the same title."""
    old = path.read_text() if path.exists() else "# Benchmark results\n"
    head, *sections = old.split("\n## ")
    kept = [section for section in sections if section.split("\n", 1)[0] != report.title]
    parts = [head.strip(), *(f"## {section.strip()}" for section in [*kept, _section(report)])]
    path.write_text("\n\n".join(parts) + "\n")


def _section(report: Report) -> str:
    lines = [
        report.title,
        "",
        f"{datetime.date.today().isoformat()}. " + _listed(report.machine) + ".",
        "",
        _listed(report.settings) + ". Median (min-max) over the rounds; ratios are made round by "
        "round. TTFT and ITL are what a client sees over HTTP.",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "| --- | --- |" + " ---: |" * (len(_HEADINGS) - 2),
    ]
    for cell in report.cells():
        for server in report.servers():
            lines.append("| " + " | ".join(_row(report, cell, server)) + " |")
    return "\n".join(lines)


def _row(report: Report, cell: Cell, server: str) -> list[str]:
    samples = report.samples(cell, server)
    figures = [_shown(_spread(samples.values(), column), column.digits) for column in _COLUMNS]
    tokens = [f"{sample.tokens} ({sample.short})" for sample in samples.values()]
    return [
        cell.name,
        server,
        *figures,
        ", ".join(dict.fromkeys(tokens)),
        _shown(_ratio(report, cell, server, _COLUMNS[0]), 2),
        _shown(_ratio(report, cell, server, _COLUMNS[1]), 2),
    ]


def _ratio(report: Report, cell: Cell, server: str, column: Column) -> Spread | None:
    """Our figure over the server's, made round by round so that a slow round cancels out."""
    ours = report.samples(cell, "ours")
    if server == "ours":
        return None
    ratios = []
    for number, sample in report.samples(cell, server).items():
        above = column.value(ours[number]) if number in ours else None
        below = column.value(sample)
        if above is not None and below:
            ratios.append(above / below)
    return Spread.of(ratios)


def _spread(samples: Iterable[Sample], column: Column) -> Spread | None:
    values = (column.value(sample) for sample in samples)
    return Spread.of([value for value in values if value is not None])


def _shown(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def _draw(axes: Axes, report: Report, cells: Sequence[Cell], server: str, column: Column) -> None:
    """One line: the medians of `column` over the streams, with the extremes as error bars."""
    points = [
        (cell.streams, spread)
        for cell in cells
        if (spread := _spread(report.samples(cell, server).values(), column)) is not None
    ]
    if not points:
        return
    axes.errorbar(
        [streams for streams, _ in points],
        [spread.median for _, spread in points],
        yerr=[
            [spread.median - spread.low for _, spread in points],
            [spread.high - spread.median for _, spread in points],
        ],
        marker="o",
        capsize=3,
        label=server,
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    """The processor's name, which Python's own `platform` does not know on Linux."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
