"""Writes Lark grammars."""

import json
from typing import Any

from mlx_server.models.text.grammars.parts import Grammar, json_grammar, lark_grammar
from mlx_server.models.text.special_tokens import SpecialTokens

ANY_TEXT = "/(?s:.*)/"


class Lark:
    """A grammar in the making; methods return rule symbols."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special
        self._rules: dict[str, str] = {}
        self._parts: dict[str, str] = {}

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Add a rule unless it exists; upper-case names are terminals."""
        definition = f"{options}: {body}"
        return self._rules.setdefault(definition, f"{name}_{len(self._rules)}")

    def part(self, grammar: Grammar) -> str:
        text = json.dumps(grammar, ensure_ascii=False)
        return "@" + self._parts.setdefault(text, f"part_{len(self._parts)}")

    def schema(self, strict: Any) -> str:
        return self.part(json_grammar(strict))

    def exactly(self, text: str) -> str:
        pieces = self._special.split(text)
        return " ".join(quoted(one) if isinstance(one, str) else f"<[{one}]>" for one in pieces)

    def factored(self, one: str, other: str) -> tuple[str, str, str]:
        """What both begin with, and the rest of each."""
        length = min(len(one), len(other))
        while one[:length] != other[:length]:
            length -= 1
        length = min(self._special.cut(text, length) for text in (one, other))
        return self.exactly(one[:length]), self.exactly(one[length:]), self.exactly(other[length:])

    def special_token(self, marker: str) -> int | None:
        return next(iter(self._special.find(marker)), None)

    def text_without(self, marker: str) -> str:
        """Also excludes other tokenizations of `marker`."""
        return self.rule("TEXT", text_without(marker))

    def text_until(self, marker: str, text: str = ANY_TEXT) -> str:
        """`text` is a terminal for what may be said before `marker`."""
        first = next(self._special.split(marker), "")
        if isinstance(first, int):
            before = self.rule("TEXT", f"{text} & {text_without(marker)}")
            return self.rule("until", f"{before} {self.exactly(marker)}")
        before = text if text == ANY_TEXT else self.rule("TEXT", text)
        until = self.rule("until", f"{before} {quoted(first)}", "[lazy]")
        return f"{until} {self.exactly(marker[len(first) :])}"

    def tokens_until(self, marker: str, limit: int) -> str:
        """At most `limit` tokens before `marker`, which must hold a special token."""
        if limit == 0:
            return self.exactly(marker)
        limited = self.rule("limited", self.text_without(marker), f"[max_tokens={limit}]")
        return self.rule("until", f"{limited} {self.exactly(marker)}")

    def source(self, start: str) -> str:
        rules = [f"{name}{definition}" for definition, name in self._rules.items()]
        main = lark_grammar("\n".join([f"start: {start}", *rules]))
        parts = [{"name": name, **json.loads(text)} for text, name in self._parts.items()]
        return json.dumps({"grammars": [main, *parts]}, ensure_ascii=False)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def text_without(*texts: str) -> str:
    """A terminal for text that contains none of `texts`."""
    return " & ".join([ANY_TEXT, *(f"~({ANY_TEXT} {quoted(text)} {ANY_TEXT})" for text in texts)])
