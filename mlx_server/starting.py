"""What a process does once, at its start."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good() -> Iterator[None]:
    """What is made here stays: the garbage collector neither looks through it now, which takes a
    fifth of the time that importing takes, nor later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
