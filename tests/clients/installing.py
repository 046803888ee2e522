"""Programs and packages from the package indexes, each in a folder that is thrown away.

`MLX_SERVER_CLIENTS` names a folder in which they are kept for the next time.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NODE = "node@24.21.0"
MINUTES = 15


@dataclass(frozen=True)
class Python:
    """Packages of the Python index in a virtual environment; `python`: versions that will do."""

    packages: tuple[str, ...]
    python: tuple[str, ...] = ()


@dataclass(frozen=True)
class Npm:
    """Packages of the npm index, beside a Node.js that is new enough."""

    packages: tuple[str, ...]


Wanted = Python | Npm


def install(folder: Path, name: str, wanted: Wanted) -> Path:
    """The folder of its commands. What is there already is taken as it is."""
    place = Path(os.environ.get("MLX_SERVER_CLIENTS", folder)) / name
    if isinstance(wanted, Python):
        return _virtual_environment(place, wanted)
    return _node_modules(place, wanted)


def _virtual_environment(place: Path, wanted: Python) -> Path:
    commands = place / "bin"
    done = place / "installed"
    if not done.exists():
        found = (shutil.which(f"python{version}") for version in wanted.python)
        python = next((one for one in found if one and _runs(one)), sys.executable)
        _run([python, "-m", "venv", "--clear", str(place)])
        _run([str(commands / "pip"), "install", "-q", *wanted.packages])
        done.touch()
    return commands


def _runs(python: str) -> bool:
    """Version managers put commands of versions into the path that they do not run."""
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


def _node_modules(place: Path, wanted: Npm) -> Path:
    commands = place / "node_modules" / ".bin"
    done = place / "installed"
    if not done.exists():
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text('{"type": "module"}')
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(place)]
        _run([*install, NODE])
        # With the new Node.js in front npm takes it for the one that packages ask for.
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        _run([*install, *wanted.packages], PATH=path)
        done.touch()
    return commands


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
