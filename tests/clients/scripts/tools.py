"""The tools of an agent, for the scripts beside: plain functions, run in the working folder."""

import subprocess
from pathlib import Path


def read_file(path: str) -> str:
    """Read a file."""
    return Path(path).read_text()


def edit_file(path: str, old: str, new: str) -> str:
    """Replace a text in a file."""
    file = Path(path)
    file.write_text(file.read_text().replace(old, new))
    return "edited"


def run_command(command: list[str], output: str) -> str:
    """Run a command and write what it prints to a file."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    Path(output).write_text(done.stdout)
    return done.stdout


TOOLS = (read_file, edit_file, run_command)
