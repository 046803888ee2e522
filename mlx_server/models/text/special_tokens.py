"""Special tokens within texts."""

import re
from collections.abc import Iterator, Mapping


class SpecialTokens:
    """`ids` are by text; of overlapping tokens the longest wins."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        texts = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def find(self, *texts: str) -> dict[int, str]:
        found = (token for text in texts for token in self._pattern.findall(text))
        return {self._ids[token]: token for token in found}

    def cut(self, text: str, length: int) -> int:
        """The longest start of `text`, up to `length`, that ends within no token."""
        within = (m for m in self._pattern.finditer(text) if m.start() < length < m.end())
        return min((match.start() for match in within), default=length)

    def split(self, text: str) -> Iterator[str | int]:
        position = 0
        for match in self._pattern.finditer(text):
            if plain := text[position : match.start()]:
                yield plain
            yield self._ids[match[0]]
            position = match.end()
        if plain := text[position:]:
            yield plain
