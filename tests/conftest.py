"""What all tests need when they run side by side."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has engines of its own, whose threads would wait for each other's.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
