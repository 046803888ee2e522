"""One picture a group: bars of the medians, with the extremes of the rounds, and the targets."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cells import GROUPS
from benchmarks.report import Report

_WIDTH = 0.8
"""Of all bars of a cell together; cells are 1 apart."""


def write_plot(report: Report, path: Path) -> None:
    """A PNG with one row of bars for each of the group's plotted figures."""
    plotted = [name for name in GROUPS[report.group].plotted if name in report.headings()]
    figure = Figure(figsize=(4 * len(plotted), 3.2), layout="constrained")
    for axes, heading in zip(
        figure.subplots(1, len(plotted), squeeze=False)[0], plotted, strict=True
    ):
        _draw(axes, report, heading)
    figure.suptitle(report.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _draw(axes: Axes, report: Report, heading: str) -> None:
    cells, servers = report.cells(), report.servers()
    width = _WIDTH / len(servers)
    for number, server in enumerate(servers):
        spreads = [report.spread(cell, server, heading) for cell in cells]
        known = [(place, spread) for place, spread in enumerate(spreads) if spread is not None]
        if not known:
            continue
        axes.bar(
            [place + (number - (len(servers) - 1) / 2) * width for place, _ in known],
            [spread.median for _, spread in known],
            width,
            yerr=[
                [spread.median - spread.low for _, spread in known],
                [spread.high - spread.median for _, spread in known],
            ],
            capsize=3,
            color=f"C{number}",
            label=server,
        )
    for target in GROUPS[report.group].targets:
        if target.figure == heading and target.against is None:
            axes.axhline(target.bound, color="black", linestyle="--", linewidth=1, label="target")
    axes.set_xticks(range(len(cells)), cells)
    axes.set(title=heading, ylim=(0, None))
    axes.legend(fontsize="small")
