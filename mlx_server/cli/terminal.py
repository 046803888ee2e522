"""The terminal's keyboard while something is drawn."""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

LOCAL_MODES = 3
"""Where `termios.tcgetattr` has them."""


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keys that are typed meanwhile are kept for whoever reads next, and not shown: they, and the
    `^C` of Ctrl-C, would tear what is drawn.
    """
    if not _is_ours():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = list(before)
    quiet[LOCAL_MODES] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        if _is_ours():
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _is_ours() -> bool:
    """The system stops whoever changes a terminal from the background."""
    return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
