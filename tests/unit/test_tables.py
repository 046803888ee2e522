"""Tables of commands: what stays where there is little room."""

import io

import pytest
from rich.console import Console

from mlx_server.cli.tables import Column, table

COLUMNS = (
    Column("ID", ["org/a-model-of-many-words"]),
    Column("State", ["ready"]),
    Column("Memory", ["0.55 GB"], 1, number=True),
    Column("PID", ["12345"], 2, number=True),
)


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (80, ["ID", "State", "Memory", "PID"]),
        (45, ["ID", "State", "Memory", "PID"]),
        (36, ["ID", "State", "Memory"]),
        (20, ["ID", "State"]),
    ],
)
def test_the_least_important_columns_go_first_and_no_cell_is_cut(
    width: int, names: list[str]
) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(COLUMNS, width))
    assert isinstance(console.file, io.StringIO)
    header, *rows = console.file.getvalue().splitlines()
    assert header.split() == names
    assert max(map(len, [header, *rows])) <= width
    ids = "".join(row[: header.index("State")].strip() for row in rows)
    assert ids == "org/a-model-of-many-words"
    assert "…" not in "".join(rows)
