"""Reads tool calls out of a text as it comes: what stands between a family's markers for them."""

import json
import re
from collections.abc import Sequence

from mlx_server.engine.protocol import FinishReason
from mlx_server.models.text.adapters.base import CallSyntax
from mlx_server.schemas.internal import ToolUse
from mlx_server.services.output.pieces import Kind, Piece, called, hidden, said

LONGEST_HEADER = 1000
"""Characters in which a call must have come to its arguments, and the next call after it."""

STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
STRING_REST = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
SPACE = re.compile(r"\s*")
SEPARATORS = re.compile(r"[\s,;\]]*")
LIST_END = re.compile(r"\s*\]?\s*")
EXTRA_KEY = re.compile(r',\s{0,99}"')
EXTRA_KEY_BEGUN = re.compile(r",\s{0,99}")


class CallReader:
    """Reads one block: from behind its start marker to where it ends.

    JSON is read as it comes, so that a call's arguments are told while they are generated. What is
    not what was expected is collected, as other syntaxes are, to be parsed when it is whole: it
    stands in `unparsed` then, until `parsed` is told of the outcome. What is garbled comes back as
    text, to the letter. A call whose arguments have begun stays a call, whatever becomes of them.

    `opening` is what led to the block: the start marker, with the white space in front of it. There
    may be no marker; then what is not as expected is not collected either.
    """

    def __init__(self, syntax: CallSyntax, use: ToolUse, opening: str) -> None:
        self.unparsed: str | None = None
        """What has to be parsed before more can be read."""
        self.rest: str | None = None
        """What follows the block, once it has ended."""
        self.calls = 0
        """The calls that are complete."""
        self._syntax = syntax
        self._names = {tool["function"]["name"] for tool in use.tools}
        self._most = None if use.parallel else 1
        self._opening = opening
        self._collected: list[str] = []
        self._closing = ""
        self._held = ""
        self._scan = ObjectScan(syntax.end)
        self._pieces: list[Piece] = []
        self._state = self._read_header if syntax.json else self._collect

    def push(self, text: str) -> list[Piece]:
        """Take more text. Returns what it makes certain."""
        self._held += text
        while self.rest is None and self.unparsed is None and self._state():
            pass
        return self._certain()

    def finish(self, reason: FinishReason) -> list[Piece]:
        """Take the completion's end. Returns what is certain then, except what is `unparsed`."""
        if self._state in (self._read_header, self._collect):
            self._collected.append(self._held)
            self._held = ""
            if reason == "stop":
                self.unparsed = "".join(self._collected)
            else:  # half a call may look like a whole one
                self._give_back()
        elif self._state == self._read_arguments:
            self._tell(Kind.ARGUMENTS, len(self._held))
        elif self._state == self._read_extra_keys:
            self._tell(Kind.HIDDEN, len(self._held))
        else:
            self._tell(Kind.HIDDEN, _matched(LIST_END, self._held))
            marker = self._syntax.end.startswith(self._held)
            self._tell(Kind.HIDDEN if marker else Kind.TEXT, len(self._held))
        return self._certain()

    def parsed(self, calls: Sequence[tuple[str, str]]) -> list[Piece]:
        """Go on after `unparsed` has been found to hold `calls`, names and arguments."""
        self.unparsed = None
        if not calls or any(name not in self._names for name, _ in calls):
            self._give_back()
        else:
            self._pieces.append(hidden(len(self._block)))
            for name, arguments in calls[: self._most]:
                self._pieces += called(name), Piece(Kind.ARGUMENTS, arguments, 0)
                self.calls += 1
            self._end()
        return self._certain()

    # What the states do. Each goes on with what is held and says whether another is to go on.

    def _read_header(self) -> bool:
        """From a call's beginning up to its arguments."""
        try:
            found = find_header(self._held, self._syntax.arguments)
        except ValueError:
            return self._read_otherwise()
        if found is None and len(self._held) <= LONGEST_HEADER:
            return False
        if found is None or found[1] > LONGEST_HEADER or found[0] not in self._names:
            return self._read_otherwise()
        name, length = found
        self._pieces += hidden(len(self._opening) + length), called(name)
        self._held = self._held[length:]
        self._state = self._read_arguments
        return True

    def _read_otherwise(self) -> bool:
        """What is not as expected may be a call all the same, if it is an object or a list."""
        if self._opening.strip() and self._held.lstrip().startswith(("{", "[")):
            self._state = self._collect
            return True
        # Another block may begin in what follows, which is shorter than what was looked at.
        whole = self._opening + self._held
        length = len(self._opening) or 1
        self._pieces.append(said(whole[:length]))
        self._held = whole[length:]
        return self._end()

    def _read_arguments(self) -> bool:
        """From a call's arguments up to their end."""
        length, ended = self._scan.push(self._held)
        self._tell(Kind.ARGUMENTS, length)
        if not ended:
            return False
        self.calls += 1
        if self.calls == self._most:
            return self._end()
        self._state = self._read_call_end
        return True

    def _read_call_end(self) -> bool:
        """From the end of a call's arguments up to that of the call."""
        self._tell(Kind.HIDDEN, _matched(SPACE, self._held))
        if not self._held or EXTRA_KEY_BEGUN.fullmatch(self._held):
            return False
        if EXTRA_KEY.match(self._held):
            self._scan = ObjectScan(self._syntax.end, depth=1)
            self._state = self._read_extra_keys
            return True
        self._tell(Kind.HIDDEN, int(self._held[0] == "}"))
        self._state = self._read_separators
        return True

    def _read_extra_keys(self) -> bool:
        """What a call says after its arguments, such as an id of its own. Nobody is told."""
        length, ended = self._scan.push(self._held)
        self._tell(Kind.HIDDEN, length)
        self._state = self._read_separators if ended else self._read_extra_keys
        return ended

    def _read_separators(self) -> bool:
        """From the end of a call up to the next one, or to the block's end."""
        self._tell(Kind.HIDDEN, _matched(SPACE, self._held))
        held, end = self._held, self._syntax.end
        length = _matched(SEPARATORS, held)
        if length <= LONGEST_HEADER:
            if end and held.startswith(end, length):
                self._tell(Kind.HIDDEN, length + len(end))
                return self._end()
            if held.startswith("{", length):
                self._opening, self._held = held[:length], held[length:]
                self._scan = ObjectScan(end)
                self._state = self._read_header
                return True
            if end.startswith(held[length:]):
                return False
        self._tell(Kind.HIDDEN, _matched(LIST_END, held))
        return self._end()

    def _collect(self) -> bool:
        """All up to the block's end."""
        end = self._syntax.end
        found = self._held.find(end) if end else -1
        if found >= 0:
            self._collected.append(self._held[:found])
            self._closing = end
            self._held = self._held[found + len(end) :]
            self.unparsed = "".join(self._collected)
        elif (sure := len(self._held) - max(len(end) - 1, 0)) > 0:
            self._collected.append(self._held[:sure])
            self._held = self._held[sure:]
        return False

    # What they have in common.

    @property
    def _block(self) -> str:
        """All of a block that was collected, as it stands in the completion."""
        return self._opening + "".join(self._collected) + self._closing

    def _tell(self, kind: Kind, length: int) -> None:
        """Make a piece of the first `length` characters that are held."""
        if length:
            text = "" if kind is Kind.HIDDEN else self._held[:length]
            self._pieces.append(Piece(kind, text, length))
            self._held = self._held[length:]

    def _give_back(self) -> None:
        self._pieces.append(said(self._block))
        self._end()

    def _end(self) -> bool:
        self.rest, self._held = self._held, ""
        return False

    def _certain(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


class ObjectScan:
    """Finds where a JSON object ends that comes in pieces, by its brackets and strings alone.

    A marker outside of strings ends it too, as none can stand there.
    """

    def __init__(self, marker: str, depth: int = 0) -> None:
        self._marker = marker
        self._depth = depth
        self._in_string = False
        self._special = re.compile(r'["{}\[\]' + re.escape(marker[:1]) + "]")

    def push(self, text: str) -> tuple[int, bool]:
        """How much of `text` is surely the object's, and whether it ends there."""
        position = 0
        while True:
            if self._in_string:
                position += _matched(STRING_REST, text, position)
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
            if self._takes_last(found[0]):
                return position, True

    def _takes_last(self, character: str) -> bool:
        """Take a character of the structure; whether it is the object's last."""
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def find_header(text: str, arguments: str) -> tuple[str, int] | None:
    """The name in the call that `text` begins with, and where the call's arguments begin.

    `arguments` is their key. None while `text` is too short to tell. Raises ValueError when it is
    no such call.
    """
    name = ""
    position = _matched(SPACE, text)
    position += text.startswith("[", position)
    for expected in ("{", '"name"', ":", '"', ",", f'"{arguments}"', ":", "{"):
        position += _matched(SPACE, text, position)
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


def _matched(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    """How many characters a pattern that always matches does match at `start`."""
    match = pattern.match(text, start)
    assert match is not None
    return match.end() - start
