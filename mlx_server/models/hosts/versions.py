"""What must be the same on all machines of a model, read from packages' metadata."""

import sys
from importlib.metadata import PackageNotFoundError, version

from mlx_server import __version__


def own_versions() -> dict[str, str]:
    found = {"mlx-server": __version__, "Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in ("mlx", "mlx-lm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
