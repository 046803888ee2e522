"""Tables that lose columns before they lose words on a narrow terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

GAP = 2


@dataclass(frozen=True)
class Column:
    """`rank`: which go first where there is no room, the highest; 0 stays."""

    name: str
    cells: Sequence[str]
    rank: int = 0
    number: bool = False

    @property
    def width(self) -> int:
        return max(len(self.name), *(len(cell) for cell in self.cells))


def table(columns: Sequence[Column], width: int) -> "Table":
    """The first column's cells are folded where even so there is no room for them."""
    from rich.table import Table

    shown = _fitting(columns, width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        table.add_column(column.name, justify="right" if column.number else "left", no_wrap=True)
    table.columns[0].no_wrap = False
    table.columns[0].overflow = "fold"
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*cells)
    return table


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The first, which is folded, is content with half of the width."""
    first, *others = columns
    room = width - min(first.width, width // 2)
    while sum(column.width + GAP for column in others) > room:
        dropped = max(others, key=lambda column: column.rank, default=None)
        if dropped is None or dropped.rank == 0:
            break
        others.remove(dropped)
    return [first, *others]
