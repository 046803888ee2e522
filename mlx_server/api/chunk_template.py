"""Fast writing of chunks that differ in a text only."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import msgspec

Key = TypeVar("Key", bound=Hashable)


class ChunkTemplate(Generic[Key]):
    """Writes chunks that differ only in a key (such as a choice's index) and a text; renders one
    per key in full.
    """

    _HOLE = "\0"

    def __init__(self, render: Callable[[Key, str], bytes]) -> None:
        self._render = render
        self._around: dict[Key, tuple[bytes, bytes]] = {}

    def fill(self, key: Key, text: str) -> bytes:
        around = self._around.get(key)
        if around is None:
            around = self._around[key] = self._split(key)
        return around[0] + msgspec.json.encode(text) + around[1]

    def _split(self, key: Key) -> tuple[bytes, bytes]:
        # The last one: no id or name comes after the text.
        rendered = self._render(key, self._HOLE)
        before, _, after = rendered.rpartition(msgspec.json.encode(self._HOLE))
        return before, after
