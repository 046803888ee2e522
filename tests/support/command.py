"""The `mlx-server` command, run in the process that tests it."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_server.cli.app import main

COMMAND = [sys.executable, "-m", "mlx_server"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has nothing yet."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLX_SERVER_")}
    return kept | {
        "MLX_SERVER_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "COLUMNS": "200",
    }


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(environment: dict[str, str], *arguments: str, given: str = "") -> Done:
    """The command in this process, which spares it a second of imports, with `given` piped in."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        # Read from the environment when huggingface_hub is imported.
        patch.setattr(constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
        patch.setattr(sys, "stdin", io.StringIO(given))
        patch.setattr(sys, "argv", ["mlx-server", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
    code = caught.value.code
    return Done(code if isinstance(code, int) else 0, stdout.getvalue(), stderr.getvalue())


def refusal(environment: dict[str, str], *arguments: str) -> str:
    """The one line that a mistake gets."""
    done = run(environment, *arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
