"""Checks that constraints.txt can be installed on every platform and Python that is supported.

`python scripts/check_pins.py` asks the package index, through pip, for a wheel of each pin, and
checks that what the project and its dependencies require is pinned to a version that they accept.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


@dataclass(frozen=True)
class Platform:
    """`tags` are those of wheels, best first; `markers` differ from the machine that checks."""

    name: str
    extras: tuple[str, ...]
    tags: tuple[str, ...]
    markers: dict[str, str]

    def environment(self, python: str) -> dict[str, str]:
        whole = {key: str(value) for key, value in default_environment().items()}
        versions = {"python_version": python, "python_full_version": f"{python}.0"}
        return whole | versions | self.markers


def linux(machine: str) -> Platform:
    markers = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine}
    tags = tuple(f"manylinux_2_{minor}_{machine}" for minor in range(35, 16, -1))
    return Platform(
        f"linux {machine}",
        ("dev", "docs", "ui", "cpu"),
        (*tags, f"manylinux2014_{machine}"),
        markers,
    )


MAC = Platform(
    "macos arm64",
    ("dev", "docs", "ui"),
    tuple(
        f"macosx_{major}_0_{kind}"
        for major in range(14, 10, -1)
        for kind in ("arm64", "universal2")
    ),
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
)
PLATFORMS = (MAC, linux("aarch64"), linux("x86_64"))


def problems(platform: Platform, python: str) -> list[str]:
    """What keeps the pins from being installed there."""
    environment = platform.environment(python)
    try:
        found = wheels(platform, python, pins(environment))
    except subprocess.CalledProcessError as error:
        return [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
    return sorted(set(unmet(roots_of(platform), found, environment)))


def pins(environment: dict[str, str]) -> list[str]:
    """Those that count there, as pip takes them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    every = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [f"{one.name}{one.specifier}" for one in wanted(every, environment, "")]


def wheels(platform: Platform, python: str, versions: list[str]) -> dict[str, dict[str, Any]]:
    """Metadata of the wheels of `versions`, by name. Raises CalledProcessError if one has none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        command += ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
        command += ["--python-version", python, "--implementation", "cp"]
        command += [part for tag in platform.tags for part in ("--platform", tag)]
        command += ["--target", folder, "--report", str(report), *versions]
        subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(report.read_text())["install"]
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in found}


def roots_of(platform: Platform) -> list[Requirement]:
    """What the project itself requires there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"]]
    groups += [project["optional-dependencies"][extra] for extra in platform.extras]
    return [Requirement(line) for group in groups for line in group]


def unmet(
    roots: list[Requirement], found: dict[str, dict[str, Any]], environment: dict[str, str]
) -> Iterable[str]:
    """What `roots` and all that they bring require and `found`, metadata by name, does not hold."""
    waiting = list(wanted(roots, environment, ""))
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            yield f"{requirement} is required and {name} is not pinned"
            continue
        metadata = found[name]
        if not requirement.specifier.contains(metadata["version"], prereleases=True):
            yield f"{requirement} is required and {metadata['version']} is pinned"
        needs = [Requirement(line) for line in metadata.get("requires_dist", [])]
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += wanted(needs, environment, extra)


def wanted(
    requirements: Iterable[Requirement], environment: dict[str, str], extra: str
) -> Iterable[Requirement]:
    """Those whose markers are true in `environment` and for `extra`."""
    for one in requirements:
        if one.marker is None or one.marker.evaluate({**environment, "extra": extra}):
            yield one


if __name__ == "__main__":
    failed = False
    for target, version in product(PLATFORMS, PYTHONS):
        wrong = problems(target, version)
        failed = failed or bool(wrong)
        print(target.name, version, "; ".join(wrong) or "ok", flush=True)
    sys.exit(failed)
