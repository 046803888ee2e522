"""Grammars in Lark as one regular expression, for texts that stand inside JSON.

A rule that refers to itself is written out to a depth: what then matches is always of the grammar,
if not all of it.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from mlx_server.models.text.grammars.json_schema import Unkept

MAX_PATTERN = 32 * 1024
"""Characters."""
MAX_NESTING = 4
MAX_DEPTH = 100
MAX_REPEATS = 1000
MAX_STEPS = 50_000
"""Rules written out, one for each time that it is referred to."""
COMMON = {
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+",
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": "[0-9]+",
    "SIGNED_INT": r"[+\-]?[0-9]+",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)",
    "FLOAT": r"(?:[0-9]+[eE][+\-]?[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+\-]?[0-9]+)?)",
    "NUMBER": r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+\-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+\-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+\-]?[0-9]+)?",
    "LETTER": "[a-zA-Z]",
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "WORD": "[a-zA-Z]+",
    "CNAME": "[a-zA-Z_][a-zA-Z_0-9]*",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\[^\n])*"',
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
}
"""Terminals of Lark's `common`."""

TOKEN = re.compile(
    r"""
    (?P<space>(?:\s|//[^\n]*|\#[^\n]*)+)
    | (?P<directive>%[a-z]+)
    | (?P<arrow>->)
    | (?P<name>[?!]{0,2}[A-Za-z_]\w*)
    | (?P<text>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\\n])+/[imsux]*)
    | (?P<number>-?[0-9]+)
    | (?P<mark>\.\.|[|()\[\]+*?~:.,])
    """,
    re.VERBOSE,
)

Token = tuple[str, str]
END: Token = ("end", "")

Build = Callable[["_Expansion"], str | None]
"""Writes a part of the pattern; None: nothing matches within the depth."""


def pattern_of(lark: str) -> str:
    """Of whole texts. Raises Unkept."""
    parser = _Parser(_tokens(lark))
    parser.read()
    if "start" not in parser.rules:
        raise Unkept("", "it has no rule `start`")
    best: str | None = None
    for nesting in range(MAX_NESTING + 1):
        expansion = _Expansion(parser.rules, parser.ignored, nesting)
        try:
            best = expansion.rule("start") or best
        except _TooLong:
            break
        except RecursionError:
            raise Unkept("", "it is nested too deeply") from None
        if not expansion.cut:
            break
    if best is None and expansion.cut:
        raise Unkept("", "nothing can match it without end")
    if best is None:
        raise Unkept("", f"it takes a pattern of more than {MAX_PATTERN} characters")
    return best


def whole_pattern(regex: str) -> str:
    """With the anchors that it may have once only."""
    bare = regex.removeprefix("^")
    if bare.endswith("$") and (len(bare) - len(bare[:-1].rstrip("\\"))) % 2 == 1:
        bare = bare[:-1]
    return f"^(?:{bare})$"


class _TooLong(Exception):
    pass


@dataclass(slots=True)
class _Expansion:
    rules: Mapping[str, Build]
    ignored: Sequence[Build]
    nesting: int
    cut: bool = False
    steps: int = 0
    open: list[str] = field(default_factory=list)

    def rule(self, name: str) -> str | None:
        if name not in self.rules:
            raise Unkept("", f"it has no rule `{name[:64]}`")
        if self.open.count(name) > self.nesting:
            self.cut = True
            return None
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _TooLong
        if len(self.open) > MAX_DEPTH:
            raise Unkept("", f"its rules are more than {MAX_DEPTH} levels deep")
        self.open.append(name)
        written = self.rules[name](self)
        self.open.pop()
        if written is not None and len(written) > MAX_PATTERN:
            raise _TooLong
        return written if written is None or not _is_terminal(name) else self.terminal(written)

    def terminal(self, written: str) -> str:
        """With what may be ignored before it, unless within a terminal."""
        if not self.ignored or any(map(_is_terminal, self.open)):
            return written
        self.open.append("IGNORED")
        skipped = [one for build in self.ignored if (one := build(self))]
        self.open.pop()
        return f"(?:{'|'.join(skipped)})?{written}"


def _is_terminal(name: str) -> bool:
    return name.isupper()


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.rules: dict[str, Build] = {}
        self.ignored: list[Build] = []
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def read(self) -> None:
        while self._next() != END:
            kind, text = self._take()
            if kind == "directive":
                self._directive(text)
            elif kind == "name":
                self._definition(text.lstrip("?!"))
            else:
                raise _unexpected(text)

    def _directive(self, name: str) -> None:
        if name == "%ignore":
            self.ignored.append(self._alternatives())
        elif name == "%import":
            self._import()
        elif name != "%llguidance":
            raise Unkept("", f"`{name}` cannot be kept")

    def _import(self) -> None:
        self._expect("name", "common")
        if self._skip("mark", "."):
            names = [self._take()[1]]
        else:
            self._expect("mark", "(")
            names = [self._take()[1]]
            while self._skip("mark", ","):
                names.append(self._take()[1])
            self._expect("mark", ")")
        for name in names:
            if name not in COMMON:
                raise Unkept("", f"`common.{name[:64]}` is not known")
            self.rules[name] = partial(_fixed, f"(?:{COMMON[name]})")
        if self._skip("arrow"):
            self.rules[self._take()[1]] = self.rules[names[0]]

    def _definition(self, name: str) -> None:
        if self._skip("mark", "."):
            self._take()
        self._expect("mark", ":")
        self.rules[name] = self._alternatives()

    def _alternatives(self) -> Build:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unkept("", f"it is nested more than {MAX_DEPTH} levels deep")
        choices = [self._sequence()]
        while self._skip("mark", "|"):
            choices.append(self._sequence())
        self._depth -= 1
        return choices[0] if len(choices) == 1 else partial(_either, choices)

    def _sequence(self) -> Build:
        parts: list[Build] = []
        while not self._ends():
            parts.append(self._repeated(self._item()))
        if self._skip("arrow"):
            self._take()
        return parts[0] if len(parts) == 1 else partial(_joined, parts)

    def _ends(self) -> bool:
        kind, text = self._next()
        if kind == "mark":
            return text in "|)]"
        if kind == "name":
            after = self._next(1)
            return after == ("mark", ":") or (
                after == ("mark", ".") and self._next(3) == ("mark", ":")
            )
        return kind in ("end", "directive", "arrow")

    def _item(self) -> Build:
        kind, text = self._take()
        if kind == "name":
            return partial(_rule, text)
        if kind == "text":
            if self._skip("mark", ".."):
                return partial(_fixed, _range(text, self._take()[1]))
            return partial(_fixed, _literal(text))
        if kind == "regex":
            return partial(_fixed, _regex(text))
        if kind == "mark" and text in "([":
            inner = self._alternatives()
            self._expect("mark", ")" if text == "(" else "]")
            return inner if text == "(" else partial(_repeat, "?", inner)
        raise _unexpected(text)

    def _repeated(self, item: Build) -> Build:
        for mark in "?*+":
            if self._skip("mark", mark):
                return partial(_repeat, mark, item)
        if not self._skip("mark", "~"):
            return item
        least = most = self._number()
        if self._skip("mark", ".."):
            most = self._number()
        if least > most:
            raise Unkept("", f"`~{least}..{most}` counts down")
        return partial(_repeat, f"{{{least},{most}}}", item)

    def _number(self) -> int:
        kind, text = self._take()
        if kind != "number" or len(text) > 4 or not 0 <= int(text) <= MAX_REPEATS:
            raise Unkept("", f"counts go from 0 to {MAX_REPEATS}")
        return int(text)

    def _next(self, ahead: int = 0) -> Token:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else END

    def _take(self) -> Token:
        token = self._next()
        self._at += 1
        return token

    def _skip(self, kind: str, text: str | None = None) -> bool:
        found = self._next()
        if found[0] != kind or (text is not None and found[1] != text):
            return False
        self._at += 1
        return True

    def _expect(self, kind: str, text: str) -> None:
        if not self._skip(kind, text):
            raise _unexpected(self._next()[1], text)


def _fixed(written: str, expansion: _Expansion) -> str:
    return expansion.terminal(written)


def _rule(name: str, expansion: _Expansion) -> str | None:
    return expansion.rule(name)


def _either(choices: Sequence[Build], expansion: _Expansion) -> str | None:
    written = [one for build in choices if (one := build(expansion)) is not None]
    return f"(?:{'|'.join(dict.fromkeys(written))})" if written else None


def _joined(parts: Sequence[Build], expansion: _Expansion) -> str | None:
    written: list[str] = []
    for build in parts:
        one = build(expansion)
        if one is None:
            return None
        written.append(one)
    return "".join(written)


def _repeat(mark: str, item: Build, expansion: _Expansion) -> str | None:
    written = item(expansion)
    if written is None:
        return "" if mark in "?*" or mark.startswith("{0,") else None
    return f"(?:{written}){mark}" if written else ""


def _literal(text: str) -> str:
    body = text.removesuffix("i")
    written = "".join(map(_escaped, _unquoted(body)))
    return f"(?i:{written})" if text.endswith("i") else f"(?:{written})"


def _range(first: str, last: str) -> str:
    ends = [_unquoted(one) for one in (first, last)]
    if not (len(ends[0]) == len(ends[1]) == 1 and ends[0] <= ends[1]):
        raise Unkept("", "a range takes two characters in order")
    return f"[{_escaped(ends[0])}-{_escaped(ends[1])}]"


def _unquoted(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError) as error:
        raise Unkept("", f"{text[:64]} is no text") from error


def _escaped(character: str) -> str:
    if character.isalnum() or not character.isascii() or character == " ":
        return character
    return f"\\{character}" if character.isprintable() else f"\\x{ord(character):02x}"


def _regex(text: str) -> str:
    body, _, flags = text[1:].rpartition("/")
    body = body.replace(r"\/", "/")
    flags = "".join(one for one in "ims" if one in flags)
    return f"(?{flags}:{body})"


def _tokens(source: str) -> list[Token]:
    tokens: list[Token] = []
    at = 0
    while at < len(source):
        found = TOKEN.match(source, at)
        if found is None:
            raise _unexpected(source[at : at + 20])
        if found.lastgroup == "directive" and found[0] == "%llguidance":
            at = (source + "\n").index("\n", at)
            continue
        if found.lastgroup is not None and found.lastgroup != "space":
            tokens.append((found.lastgroup, found[0]))
        at = found.end()
    return tokens


def _unexpected(text: str, wanted: str = "") -> Unkept:
    hint = f" where `{wanted}` should be" if wanted else ""
    return Unkept("", f"`{text[:40]}`{hint} cannot be read" if text else f"it ends early{hint}")
