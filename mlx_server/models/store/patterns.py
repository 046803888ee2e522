"""Aliases that stand for many names."""

import re
from collections.abc import Iterable

ANY = "*"
LONGEST_NAME = 1000


def is_pattern(alias: str) -> bool:
    return ANY in alias


def matching(name: str, aliases: Iterable[str]) -> str | None:
    """The pattern among `aliases` that `name` fits; of several the longest. `*` is any text."""
    if len(name) > LONGEST_NAME:
        return None
    fitting = [alias for alias in aliases if is_pattern(alias) and _fits(name, alias)]
    return max(fitting, key=len, default=None)


def _fits(name: str, pattern: str) -> bool:
    parts = map(re.escape, pattern.split(ANY))
    return re.fullmatch(".*".join(parts), name, re.DOTALL) is not None
