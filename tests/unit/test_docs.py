"""Documentation that is made from the code is what the code says."""

import runpy
from pathlib import Path

from mlx_server.config import Settings

ROOT = Path(__file__).parent.parent.parent


def test_the_table_of_settings_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert script["BEGIN"] in text
    assert script["END"] in text
    assert text == script["updated"](text), "run `python scripts/settings_table.py`"
    assert all(f"| `{name}` |" in text for name in Settings.model_fields)


def test_every_setting_says_what_it_does() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
