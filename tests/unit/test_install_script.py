"""What scripts/install.sh says and chooses on machines that are not here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "install.sh"
TOOLS = ("sh", "sed", "head", "tr", "dirname", "mkdir", "cp", "cat")
PYTHON = """#!/bin/sh
case "$*" in
    "-c import sys"*) exit 0 ;;
    "-c import platform"*) [ {machine} != arm64 ] ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) echo "$*" >installed ;;
    --version) echo "Python 3.12.0" ;;
esac
"""
SUMMARY = "| NVIDIA-SMI 1.2.3   Driver Version: 1.2.3   CUDA Version: {version}   |"


class Machine:
    """Programs that answer as another machine's would, and nothing else on the path."""

    def __init__(self, folder: Path, answers: dict[str, str]) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)
        for name, answer in answers.items():
            self.add(name, f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
        (folder / "scripts").mkdir()
        shutil.copy(SCRIPT, folder / "scripts")

    def add(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def add_python(self, name: str, machine: str) -> None:
        self.add(name, PYTHON.format(machine=machine))

    def install(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "sh", "scripts/install.sh"],
            cwd=self.folder,
            env={"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/")},
            capture_output=True,
            text=True,
        )

    @property
    def installed(self) -> str:
        return (self.folder / "installed").read_text().split()[-1]


def mac(folder: Path, macos: str = "15.5", arm64: str = "1") -> Machine:
    return Machine(folder, {"uname": "Darwin", "sysctl": arm64, "sw_vers": macos})


def test_a_mac_needs_no_extra_for_mlx(tmp_path: Path) -> None:
    machine = mac(tmp_path)
    machine.add_python("python3.12", "arm64")
    done = machine.install()
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.installed == ".[ui]"


def test_a_python_under_rosetta_is_passed_over_for_a_native_one(tmp_path: Path) -> None:
    machine = mac(tmp_path)
    machine.add_python("python3.13", "x86_64")
    machine.add_python("python3.11", "arm64")
    assert machine.install().returncode == 0
    assert "arm64 != arm64" in (tmp_path / ".venv/bin/python").read_text()


@pytest.mark.parametrize(
    ("macos", "arm64", "python", "says"),
    [
        ("15.5", "1", "x86_64", "python3.12 is a Python for Intel processors"),
        ("13.7.1", "1", "arm64", "needs macOS 14 or newer, and this is macOS 13.7.1"),
        ("15.5", "0", "x86_64", "this one has an Intel processor"),
    ],
)
def test_a_mac_that_mlx_does_not_run_on_is_told_why(
    tmp_path: Path, macos: str, arm64: str, python: str, says: str
) -> None:
    machine = mac(tmp_path, macos, arm64)
    machine.add_python("python3.12", python)
    done = machine.install()
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("version", "target", "says"),
    [
        ("13.0", ".[cuda13,ui]", None),
        ("12.8", ".[cuda12,ui]", None),
        ("12.4", ".[cuda12,ui]", None),
        ("12.2", ".[cpu,ui]", "knows CUDA up to 12.2, and MLX needs 12.4"),
        ("11.8", ".[cpu,ui]", "knows CUDA up to 11.8, and MLX needs 12.4"),
    ],
)
def test_the_driver_decides_what_is_installed_and_one_that_is_too_old_is_named(
    tmp_path: Path, version: str, target: str, says: str | None
) -> None:
    machine = Machine(tmp_path, {"uname": "Linux", "nvidia-smi": SUMMARY.format(version=version)})
    machine.add_python("python3.12", "x86_64")
    done = machine.install()
    assert done.returncode == 0
    assert machine.installed == target
    assert (says in done.stderr) if says else done.stderr == ""


def test_without_a_driver_linux_gets_the_cpu_quietly(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"uname": "Linux"})
    machine.add_python("python3.12", "x86_64")
    done = machine.install()
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.installed == ".[cpu,ui]"


def test_without_a_python_it_says_which_is_needed(tmp_path: Path) -> None:
    done = Machine(tmp_path, {"uname": "Linux"}).install()
    assert done.returncode == 1
    assert "needs Python 3.11 or newer with its venv module" in done.stderr
