"""What is installed, read from packages' metadata: nothing heavy is imported."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from mlx_server import __version__

DEVICES = {"mlx-cuda-13": "CUDA 13", "mlx-cuda-12": "CUDA 12", "mlx-cpu": "CPU"}
"""By the package that brings MLX's device on Linux."""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def built_for() -> str | None:
    """The device that this installation of MLX is made for; `doctor` tells which it finds."""
    if sys.platform == "darwin":
        return "Metal"
    return next((name for package, name in DEVICES.items() if installed(package)), None)


def version_line() -> str:
    """Such as `mlx-server 1.0 (mlx 0.32, mlx-lm 0.32, CPU, Python 3.12.1)`."""
    parts = [f"{name} {installed(name) or 'missing'}" for name in ("mlx", "mlx-lm")]
    parts += [built_for() or "no device", f"Python {platform.python_version()}"]
    return f"mlx-server {__version__} ({', '.join(parts)})"
