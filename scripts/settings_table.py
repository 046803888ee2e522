"""Rewrites the table of settings in docs/settings.md from the settings model.

`python scripts/settings_table.py`; a test fails while the table is stale.
"""

import json
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from mlx_server.config import Settings

DOCUMENT = Path(__file__).parent.parent / "docs" / "settings.md"
BEGIN = "<!-- settings: written by scripts/settings_table.py -->\n"
END = "<!-- end of settings -->\n"


def updated(text: str) -> str:
    """The document `text` with a fresh table between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def table() -> str:
    """Every setting with its default and its meaning."""
    rows = ["| setting | default | what it does |", "| --- | --- | --- |"]
    rows += [_row(name, field) for name, field in Settings.model_fields.items()]
    return "\n".join(rows) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {_default(field.get_default(call_default_factory=True))} | {meaning} |"


def _default(value: Any) -> str:
    """A default as a TOML file would say it."""
    if value is None:
        return "unset"
    return f"`{json.dumps(value, default=str)}`"


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
