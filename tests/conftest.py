"""How tests share two workers: a file's tests stay together, and so do all of the demo model's."""

import os

import pytest

TOGETHER = ("tests/e2e", "tests/sdk")
"""Folders whose tests share a server."""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two engines side by side, whose threads would wait for each other's.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests before pytest-xdist looks, so that a server is started once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            folder, _, file = item.nodeid.partition("::")[0].rpartition("/")
            item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else file))
