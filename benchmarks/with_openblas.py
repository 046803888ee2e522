"""Runs a module as `python -m` would, with OpenBLAS loaded before MLX.

    python -m benchmarks.with_openblas MODULE [ARGUMENT ...]

mlx-server's engine loads a fast BLAS by itself; this gives its peers the same library.
"""

import runpy
import sys

from mlx_server.engine.cpu.blas import load_openblas


def main() -> None:
    """Loads the library, if there is one, and becomes the module."""
    load_openblas("auto")
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
