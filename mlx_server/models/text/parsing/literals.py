"""Reads values as JSON, Python and Gemma's braces write them."""

import json
import math
import re
import sys
from typing import Any

MAX_DEPTH = 100
SPACE = re.compile(r"\s*")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
WORD = re.compile(r"[\w$.-]+")
WORDS = {"true": True, "false": False, "null": None, "none": None}
BARE = re.compile(r"[^,{}\[\]]+")
STRINGS = {
    '"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL),
    "'": re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL),
}
ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
CLOSING = {"[": "]", "(": ")", "{": "}"}


class LiteralReader:
    """Methods take where to begin, and return a value and where it ends. Raise ValueError.
    `escape` is what texts stand between; with it, they need no quotes either.
    """

    def __init__(self, text: str, escape: str = "") -> None:
        self._text = text
        self._escape = escape
        self._depth = 0

    def value(self, position: int) -> tuple[Any, int]:
        text, position = self._text, self.skip_space(position)
        if self._escape and text.startswith(self._escape, position):
            return self._between(position + len(self._escape))
        character = text[position : position + 1]
        if character in STRINGS:
            return self._string(position, character)
        if character and character in CLOSING:
            return self._collection(position + 1, character)
        number, word = NUMBER.match(text, position), WORD.match(text, position)
        if number is not None and (word is None or word.end() <= number.end()):
            return _number(number[0]), number.end()
        if word is not None and word[0].lower() in WORDS:
            return WORDS[word[0].lower()], word.end()
        return self._unquoted(position)

    def skip_space(self, position: int) -> int:
        match = SPACE.match(self._text, position)
        assert match is not None
        return match.end()

    def _collection(self, position: int, opening: str) -> tuple[Any, int]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        pairs: dict[str, Any] = {}
        items: list[Any] = []
        closing = CLOSING[opening]
        position = self.skip_space(position)
        while not self._text.startswith(closing, position):
            if opening == "{":
                key, position = self._key(position)
                pairs[key], position = self.value(position)
            else:
                item, position = self.value(position)
                items.append(item)
            position = self.skip_space(position)
            if self._text.startswith(",", position):
                position = self.skip_space(position + 1)
            elif not self._text.startswith(closing, position):
                raise ValueError("a comma was expected")
        self._depth -= 1
        return (pairs if opening == "{" else items), position + 1

    def _key(self, position: int) -> tuple[str, int]:
        text = self._text
        if self._escape and text.startswith(self._escape, position):
            key, position = self._between(position + len(self._escape))
        elif text[position : position + 1] in STRINGS:
            key, position = self._string(position, text[position])
        else:
            word = WORD.match(text, position)
            if word is None:
                raise ValueError("a name was expected")
            key, position = word[0], word.end()
        position = self.skip_space(position)
        if not text.startswith(":", position):
            raise ValueError("a colon was expected")
        return key, position + 1

    def _between(self, position: int) -> tuple[str, int]:
        end = self._text.find(self._escape, position)
        if end < 0:
            raise ValueError("a text does not end")
        return self._text[position:end], end + len(self._escape)

    def _string(self, position: int, quote: str) -> tuple[str, int]:
        match = STRINGS[quote].match(self._text, position)
        if match is None:
            raise ValueError("a text does not end")
        return _unescaped(match[1]), match.end()

    def _unquoted(self, position: int) -> tuple[str, int]:
        match = BARE.match(self._text, position)
        if not self._escape or match is None:
            raise ValueError("a value was expected")
        return match[0].strip(), match.end()


def read_json(text: str) -> Any:
    """A value that is all of `text`. Raises ValueError, for NaN too."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=finite, strict=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_whole(text: str) -> Any:
    """Likewise, as JSON or Python."""
    try:
        return read_json(text)
    except ValueError:
        reader = LiteralReader(text)
        value, end = reader.value(0)
        if reader.skip_space(end) != len(text):
            raise ValueError("something follows") from None
        return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def finite(text: str) -> float:
    """The largest number for those beyond it."""
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


def _number(text: str) -> int | float:
    return finite(text) if re.search("[.eE]", text) else int(text)


def _unescaped(text: str) -> str:
    return _joined(ESCAPED.sub(_character, text)) if "\\" in text else text


def _character(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else ESCAPES.get(match[3], match[3])


def _joined(text: str) -> str:
    """With pairs of surrogates as one character, and lone ones replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
