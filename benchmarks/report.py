"""What a run says of a group: a table on the terminal, a JSON file and a section of Markdown."""

import datetime
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.cells import GROUPS, Target
from benchmarks.measures import DECODE_RATE, RATE, Figures, Measurement, Spread

_COMPARED = {RATE: "ours/this", DECODE_RATE: "decode ours/this"}
"""Figures whose ratio the table shows, and under which heading."""


class Report(msgspec.Struct, frozen=True):
    """One run of one group."""

    group: str
    title: str
    settings: dict[str, str]
    machine: dict[str, str]
    measurements: list[Measurement]

    def cells(self) -> list[str]:
        """The measured cells, in the order in which they were measured."""
        return list(dict.fromkeys(m.cell for m in self.measurements))

    def servers(self) -> list[str]:
        """The measured servers, in the order in which they were measured."""
        return list(dict.fromkeys(m.server for m in self.measurements))

    def headings(self) -> list[str]:
        """The names of all figures."""
        return list(dict.fromkeys(name for m in self.measurements for name in m.figures))

    def rounds(self, cell: str, server: str) -> dict[int, Figures]:
        """The figures of one server in one cell, by round."""
        return {
            m.round: m.figures for m in self.measurements if (m.cell, m.server) == (cell, server)
        }

    def spread(self, cell: str, server: str, heading: str) -> Spread | None:
        """One figure over the rounds."""
        rounds = self.rounds(cell, server).values()
        return Spread.of([figures[heading] for figures in rounds if heading in figures])

    def ratio(self, cell: str, server: str, heading: str) -> Spread | None:
        """Our figure over the server's, made round by round so that a slow round cancels out."""
        ours, theirs = self.rounds(cell, "ours"), self.rounds(cell, server)
        if server == "ours":
            return None
        return Spread.of(
            [
                ours[number][heading] / figures[heading]
                for number, figures in theirs.items()
                if figures.get(heading) and heading in ours.get(number, {})
            ]
        )


def print_table(report: Report, console: Console) -> None:
    """Median (min-max) over the rounds, one row a cell and server, and the targets."""
    table = Table(title=report.title)
    for number, heading in enumerate(_headings(report)):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for row in _rows(report):
        # The spread goes under the median: eleven columns are wide enough as it is.
        table.add_row(*(entry.replace(" (", "\n(") for entry in row))
    console.print(table)
    for cell, target, spread, verdict in _verdicts(report):
        console.print(f"{cell}: {target}: {spread}, {verdict}")


def write_json(report: Report, path: Path) -> None:
    """Every figure of every round, with the settings and the machine."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def write_markdown(report: Report, path: Path, plot: str) -> None:
    """Puts the group's section into `path`, in place of an older one with the same title."""
    old = path.read_text() if path.exists() else "# Benchmark results\n"
    head, *sections = [part.strip() for part in old.split("\n## ")]
    new = _section(report, plot).strip()
    titles = [section.split("\n", 1)[0] for section in sections]
    if report.title in titles:
        sections[titles.index(report.title)] = new
    else:
        sections.append(new)
    path.write_text("\n\n".join([head, *(f"## {section}" for section in sections)]) + "\n")


def _section(report: Report, plot: str) -> str:
    date = datetime.date.today().isoformat()
    lines = [
        report.title,
        "",
        GROUPS[report.group].told,
        "",
        *_markdown_table(["cell", "target", "measured", "holds"], 4, _verdict_rows(report)),
        "",
        f"![{report.title}]({plot})",
        "",
        *_markdown_table(_headings(report), 2, _rows(report)),
        "",
        "Median (min-max) over the rounds; ratios are made round by round. "
        f"{date}; {_listed(report.machine)}; {_listed(report.settings)}.",
    ]
    return "\n".join(lines)


def _markdown_table(headings: list[str], left: int, rows: Iterator[list[str]]) -> Iterator[str]:
    """The first `left` columns hold words, the others figures."""
    yield "| " + " | ".join(headings) + " |"
    yield "|" + " --- |" * left + " ---: |" * (len(headings) - left)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _headings(report: Report) -> list[str]:
    return ["cell", "server", *report.headings(), *_ratios(report).values()]


def _ratios(report: Report) -> dict[str, str]:
    """Those of the compared figures that the group has, where there is a server to compare."""
    if len(report.servers()) < 2:
        return {}
    return {name: title for name, title in _COMPARED.items() if name in report.headings()}


def _rows(report: Report) -> Iterator[list[str]]:
    for cell in report.cells():
        for server in report.servers():
            if not report.rounds(cell, server):
                continue
            spreads = [report.spread(cell, server, heading) for heading in report.headings()]
            spreads += [report.ratio(cell, server, heading) for heading in _ratios(report)]
            yield [cell, server, *(_shown(spread) for spread in spreads)]


def _verdict_rows(report: Report) -> Iterator[list[str]]:
    for cell, target, spread, verdict in _verdicts(report):
        yield [cell, str(target), str(spread), verdict]


def _verdicts(report: Report) -> Iterator[tuple[str, Target, Spread, str]]:
    """Every target in every cell where it was measured: the medians decide."""
    for target in GROUPS[report.group].targets:
        for cell in report.cells():
            if target.against is None:
                spread = report.spread(cell, "ours", target.figure)
            else:
                spread = report.ratio(cell, target.against, target.figure)
            if spread is not None:
                yield cell, target, spread, "yes" if target.holds(spread.median) else "no"


def _shown(spread: Spread | None) -> str:
    """A figure that every round gave alike is shown once."""
    if spread is None:
        return "-"
    return str(spread) if spread.low < spread.high else str(spread).split(" ", 1)[0]


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
