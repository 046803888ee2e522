"""Scans JSON that comes in pieces: where a call's arguments begin, and where an object ends."""

import json
import re

STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
STRING_REST = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
SPACE = re.compile(r"\s*")


class ObjectScan:
    """Finds the end of a JSON object by brackets and strings alone, `depth` of which are open.

    `marker` outside of strings ends it too, as it cannot stand there.
    """

    def __init__(self, marker: str, depth: int = 0) -> None:
        self._marker = marker
        self._depth = depth
        self._in_string = False
        self._special = re.compile(r'["{}\[\]' + re.escape(marker[:1]) + "]")

    def push(self, text: str) -> tuple[int, bool]:
        """Characters of `text` that are certain, and whether the object ends behind them.

        The others must come again at the front of the next text.
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
    """The name of the call at the front of `text`, and where its arguments begin.

    None while `text` is too short to tell. Raises ValueError if it is no such call.
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
