"""Rewrites docs/cli.md from the command line's own help.

`python scripts/cli_reference.py`; a test fails while the page is stale.
"""

from pathlib import Path

import typer.main
from typer.cli import get_docs_for_click

from mlx_server.cli.app import app

DOCUMENT = Path(__file__).parent.parent / "docs" / "cli.md"
INTRODUCTION = "Written by `scripts/cli_reference.py` from `mlx-server --help`.\n\n"


def page() -> str:
    """The whole page, as Markdown."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="mlx-server")
    text = get_docs_for_click(obj=command, ctx=context, name="mlx-server", title="Commands")
    title, _, rest = text.partition("\n\n")
    lines = [line.rstrip() for line in f"{title}\n\n{INTRODUCTION}{rest}".strip().splitlines()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
