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
        _run([_python(wanted.python), "-m", "venv", "--clear", "--without-pip", str(place)])
        pip = [sys.executable, "-m", "pip", "--python", str(commands / "python")]
        _run([*pip, "install", "-q", "--disable-pip-version-check", *wanted.packages])
        done.touch()
    return commands


def _python(versions: tuple[str, ...]) -> str:
    """One that runs: version managers leave commands for those that are not switched on."""
    for version in versions:
        name = f"python{version}"
        if (
            shutil.which(name)
            and not subprocess.run([name, "-c", ""], capture_output=True).returncode
        ):
            return name
    return sys.executable


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
