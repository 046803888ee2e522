"""Scans streamed JSON: a call's header, and an object's end."""

import json
import re

STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
STRING_REST = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
SPACE = re.compile(r"\s*")
NAME_KEYS = frozenset({"name", "tool_name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
KEYS = NAME_KEYS | ARGUMENT_KEYS | {"type", "id", "tool_call_id"}
"""Of a call, up to its arguments."""


class ObjectScan:
    """Finds an object's end by brackets and strings; `depth` brackets are open. `marker` outside
    strings ends it too.
    """

    def __init__(self, marker: str, depth: int = 0) -> None:
        self._marker = marker
        self._depth = depth
        self._in_string = False
        self._special = re.compile(r'["{}\[\]' + re.escape(marker[:1]) + "]")

    def push(self, text: str) -> tuple[int, bool]:
        """(characters of `text` that are certain, whether the object ends after them). Push the
        others again before new text.
        """
        position = 0
        while True:
            if self._in_string:
                position += match_length(STRING_REST, text, position)
                if not text.startswith('"', position):
                    return position, False
                self._in_string = False
                position += 1
            found = self._special.search(text, position)
            if found is None:
                return len(text), False
            position = found.start()
            if self._marker and text.startswith(self._marker, position):
                return position, True
            if self._marker.startswith(text[position:]):
                return position, False
            position += 1
            if self._closes(found[0]):
                return position, True

    def _closes(self, character: str) -> bool:
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def find_header(text: str) -> tuple[str, int] | None:
    """The call's name, and where its arguments begin. None if `text` is too short. Raises
    ValueError for anything else.
    """
    try:
        return _HeaderScan(text).header()
    except _TooShort:
        return None


class _TooShort(Exception): ...


class _HeaderScan:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = match_length(SPACE, text)
        self._position += text.startswith("[", self._position)

    def header(self) -> tuple[str, int]:
        name = ""
        self._expect("{")
        while True:
            key = self._string(KEYS)
            self._expect(":")
            if key in ARGUMENT_KEYS:
                self._expect("{")
                return name, self._position - 1
            value = self._string(None)
            name = value if key in NAME_KEYS else name
            self._expect(",")

    def _expect(self, expected: str) -> None:
        self._skip_space()
        if not self._text.startswith(expected, self._position):
            raise ValueError("another character was expected")
        self._position += 1

    def _string(self, known: frozenset[str] | None) -> str:
        self._skip_space()
        string = STRING.match(self._text, self._position)
        if string is None:
            begun = self._text[self._position :]
            if not begun.startswith('"') or not _may_be(begun, known):
                raise ValueError("another key or value was expected")
            raise _TooShort
        self._position = string.end()
        text: str = json.loads(string[0])
        if known is not None and text not in known:
            raise ValueError("another key was expected")
        return text

    def _skip_space(self) -> None:
        self._position += match_length(SPACE, self._text, self._position)
        if self._position == len(self._text):
            raise _TooShort


def _may_be(begun: str, known: frozenset[str] | None) -> bool:
    return known is None or any(f'"{key}"'.startswith(begun) for key in known)


def match_length(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    match = pattern.match(text, start)
    assert match is not None
    return match.end() - start
