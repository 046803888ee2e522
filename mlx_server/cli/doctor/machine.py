"""Checks of the machine and of what is installed on it."""

import asyncio
import os
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

from mlx_server import __version__
from mlx_server.cli.doctor.finding import Finding, fail, ok, warn
from mlx_server.cli.options import gigabytes
from mlx_server.cli.versions import built_for, installed
from mlx_server.errors import Unavailable

if TYPE_CHECKING:
    from mlx_server.config import Settings
    from mlx_server.engine.protocol import Device

SMALL = 4_000_000_000
"""Bytes for models; less holds only small ones."""
INSTALL = "run `make install` in a clone, or see the table in README.md"


def versions() -> Finding:
    found = {name: installed(name) for name in ("mlx", "mlx-lm", "transformers")}
    shown = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    detail = f"mlx-server {__version__}, {shown}, Python {platform.python_version()}"
    if None in found.values():
        return fail("versions", detail, INSTALL)
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return fail("versions", f"{detail}, under Rosetta", "use a Python for Apple silicon")
    return ok("versions", detail)


def device(settings: "Settings") -> list[Finding]:
    """The device and its memory, asked of a process of their own."""
    from mlx_server.models.pool.device import find_device

    try:
        found = asyncio.run(find_device())
    except Unavailable as error:
        return [fail("device", str(error), INSTALL)]
    expected = built_for()
    detail = f"{found.name}, {gigabytes(found.memory)} of memory"
    if expected and expected.startswith("CUDA") and found.name == "cpu":
        fix = "check that `nvidia-smi` works and that the driver is new enough"
        findings = [warn("device", f"{detail}, though MLX was installed for {expected}", fix)]
    else:
        findings = [ok("device", detail)]
    findings.append(_memory(settings, found))
    if found.name == "metal":
        findings.append(wired(found, _sysctl("iogpu.wired_limit_mb")))
    if found.name == "cpu" and sys.platform.startswith("linux"):
        findings.append(_blas(settings))
    return findings


def _memory(settings: "Settings", device: "Device") -> Finding:
    import psutil

    budget = device.budget(settings.memory_limit)
    free = psutil.virtual_memory().available
    detail = f"{gigabytes(budget)} for models ({settings.memory_limit}), {gigabytes(free)} free now"
    if device.name != "cuda" and budget > free:
        fix = "end programs that hold memory, or lower `memory_limit`"
        return warn("memory", detail, fix)
    if budget < SMALL:
        return warn("memory", detail, "raise `memory_limit`, or serve small models")
    return ok("memory", detail)


def wired(device: "Device", limit_mb: int | None) -> Finding:
    """`limit_mb` is macOS's `iogpu.wired_limit_mb`: 0 for its own choice."""
    usable = gigabytes(device.usable)
    if limit_mb:
        return ok("wired limit", f"{limit_mb:,} MB, set by hand; models may use {usable}")
    detail = f"macOS's own; models may use {usable} of {gigabytes(device.memory)}"
    if device.usable < 0.6 * device.memory:
        wanted = int(0.8 * device.memory / (1 << 20))
        fix = f"for larger models: `sudo sysctl iogpu.wired_limit_mb={wanted}` (docs/mac.md)"
        return warn("wired limit", detail, fix)
    return ok("wired limit", detail)


def _sysctl(name: str) -> int | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _blas(settings: "Settings") -> Finding:
    from mlx_server.engine.cpu import blas

    if settings.openblas == "off":
        return warn("BLAS", "MLX's own, since `openblas` is off", "remove that setting")
    named = settings.openblas != "auto"
    found = settings.openblas if named else blas.find_openblas()
    if found is None:
        return fail("BLAS", "none but MLX's own, some 40 times slower", blas.ADVICE)
    if named and not os.path.exists(found):
        return fail("BLAS", f"there is no {found}", "mend the setting `openblas`")
    return ok("BLAS", found)


def open_files(settings: "Settings") -> Finding:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + 512
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return ok("open files", "as many as connections need")
    fix = f"`ulimit -n {wanted}` before `serve`, or lower `max_connections`"
    return warn("open files", f"{hard} at most, {wanted} wanted", fix)
