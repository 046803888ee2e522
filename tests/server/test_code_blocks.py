"""The examples of README and docs that are marked as runnable run."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.demo import MODEL
from tests.support.server import Server, serving
from tests.support.tiny import build_scripted_model

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```\w+\n(.*?)\n```", re.DOTALL)
SHELL = ["bash", "-euo", "pipefail", "-c"]
OTHER_MODEL = "qwen3-4b"
"""Named where the demo model would do badly, though it can do it."""
SAID = {
    MODEL: '{"name": "Paris", "inhabitants": 2102650}',
    OTHER_MODEL: '{"name": "Ada Lovelace", "age": 36}',
}
"""What models answer, so that it is short, and parses where it is parsed."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page.relative_to(ROOT).as_posix(), line, match[1], match[2])


@pytest.fixture(scope="module")
def keyless_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As a reader has it who has followed the README, but for what the model says."""
    home = tmp_path_factory.mktemp("home")
    for name, text in SAID.items():
        build_scripted_model(home / "models" / name, text)
    with serving(home, "--model", MODEL) as server:
        yield server


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_an_example_runs(
    block: Block, keyless_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # In the place of the address that the page names.
    text = block.text.replace("http://127.0.0.1:8000", keyless_server.url)
    if block.language == "python":  # in this process, which spares it a second of imports
        exec(compile(text, str(block), "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out.strip()
        return
    done = subprocess.run(
        [*SHELL, text],
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MLX_SERVER_HOME": str(tmp_path),
            "MLX_SERVER_PORT": keyless_server.url.rpartition(":")[2],
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip()
