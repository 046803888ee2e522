"""Markers in a model's text, of which some are special tokens, as symbols of a grammar."""

import re
from collections.abc import Mapping

from mlx_server.models.text.grammars.lark import ANY_TEXT, Lark, quoted, text_without


class Markers:
    """Tells which parts of a text are special tokens: those of `special`, ids by their texts."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        names = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def found(self, *texts: str) -> dict[int, str]:
        """The special tokens in `texts`, by their ids."""
        names = (name for text in texts for name in self._pattern.findall(text))
        return {self._special[name]: name for name in names}

    def symbols(self, text: str) -> str:
        """`text` in Lark: special tokens by their ids, the rest as literals."""
        result, position = [], 0
        for match in self._pattern.finditer(text):
            result += [quoted(text[position : match.start()]), f"<[{self._special[match[0]]}]>"]
            position = match.end()
        return " ".join(filter(None, [*result, quoted(text[position:])]))

    def text_until(self, lark: Lark, marker: str) -> str:
        """Any text, up to and with the first `marker`, as a symbol of `lark`."""
        if not self.found(marker):
            return lark.rule("until", f"{ANY_TEXT} {quoted(marker)}", "[lazy]")
        return lark.rule("until", f"{self.text_without(lark, marker)} {self.symbols(marker)}")

    def tokens_until(self, lark: Lark, marker: str, limit: int) -> str:
        """The same in at most `limit` tokens before `marker`, which must hold a special token."""
        if limit == 0:
            return self.symbols(marker)
        text = self.text_without(lark, marker)
        limited = lark.rule("limited", text, f"[max_tokens={limit}]")
        return lark.rule("until", f"{limited} {self.symbols(marker)}")

    def text_without(self, lark: Lark, marker: str) -> str:
        """Any text in which `marker` does not stand, not even spelled, as a symbol of `lark`."""
        return lark.rule("TEXT", text_without(marker))
