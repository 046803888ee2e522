"""What all tests need when they run side by side."""

import gc
import os
import signal

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has engines of its own, whose threads would wait for each other's.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

# A shell has what it runs in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compare float32 models with themselves in other shapes of batch. On CUDA, MLX would multiply
# float32 in TF32, which keeps three digits.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests stay to the end. The garbage collector would look through them again and
    again, a fifth of what tests in this process take.
    """
    gc.collect()
    gc.freeze()
