"""What all tests need when they run side by side."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest
import uvloop
from hypothesis import settings

# jsonschema imports it for formats that no test has, and it builds dozens of grammars: 3 s.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has engines of its own, whose threads would wait for each other's.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

# A shell has what it runs in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compare float32 models with themselves in other shapes of batch. On CUDA, MLX would multiply
# float32 in TF32, which keeps three digits.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

TOGETHER = ("tests/browser/", "tests/e2e/")

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests stay to the end. The garbage collector would look through them again and
    again, a third of what collecting them takes and a fifth of what tests in this process take.
    """
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, one worker for all files of a folder whose server starts slowly."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next(filter(nodeid.startswith, TOGETHER), super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The front's own loop. With that of asyncio, how a process ended may be lost if it is killed
    while it ends.
    """
    return {"uvloop": uvloop.new_event_loop}
