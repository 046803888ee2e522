"""Scans streamed JSON: a call's header, and an object's end."""

import json
import re

STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
STRING_REST = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
SPACE = re.compile(r"\s*")


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


def find_header(text: str, arguments_key: str) -> tuple[str, int] | None:
    """The call's name, and where its arguments begin. None if `text` is too short. Raises
    ValueError for anything else.
    """
    name = ""
    position = match_length(SPACE, text)
    position += text.startswith("[", position)
    for expected in ("{", '"name"', ":", '"', ",", f'"{arguments_key}"', ":", "{"):
        position += match_length(SPACE, text, position)
        if not text.startswith(expected, position):
            if expected.startswith(text[position:]):
                return None
            raise ValueError("another key or value was expected")
        if expected != '"':
            position += len(expected)
            continue
        string = STRING.match(text, position)
        if string is None:
            return None
        name = json.loads(string[0])
        position = string.end()
    return name, position - 1


def match_length(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    match = pattern.match(text, start)
    assert match is not None
    return match.end() - start
