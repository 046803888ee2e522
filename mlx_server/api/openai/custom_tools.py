"""Custom tools, whose input is a text of any form: for models, functions of one parameter."""

import re

import msgspec

from mlx_server.schemas.openai.tools import CustomDefinition, FunctionDefinition

INPUT = "input"
OPENING = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
MAX_OPENING = 64
"""Characters before the input's first, white space included."""
PLAIN = re.compile(r'[^"\\]+')
ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|u[0-9a-fA-F]{4}|[^u])")
LONGEST_ESCAPE = 12


def as_function(tool: CustomDefinition) -> FunctionDefinition:
    told = "The tool's input, as plain text."
    if grammar := tool.format.grammar:
        kind = {"lark": "Lark grammar", "regex": "regular expression"}[grammar.syntax]
        told = f"{told} It must match this {kind}:\n{grammar.definition}"
    return FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters={
            "type": "object",
            "properties": {INPUT: {"type": "string", "description": told}},
            "required": [INPUT],
        },
        strict=tool.format.grammar is not None,
    )


def wrapped(text: str) -> dict[str, str]:
    """A call's arguments for its input."""
    return {INPUT: text}


class InputReader:
    """Reads the input out of a call's arguments as they come. Of arguments in another form all is
    input.
    """

    def __init__(self) -> None:
        self._held = ""
        self._all: list[str] = []
        self._inside = False
        self._over = False

    def push(self, arguments: str) -> str:
        self._all.append(arguments)
        if self._over:
            return ""
        self._held += arguments
        if not self._inside:
            opening = OPENING.match(self._held)
            if opening is None or opening.end() > MAX_OPENING:
                self._over = len(self._held) > MAX_OPENING
                return ""
            self._inside, self._held = True, self._held[opening.end() :]
        return self._read()

    def finish(self) -> str:
        """What is left to tell."""
        if self._inside:
            return ""
        whole = "".join(self._all)
        try:
            value = msgspec.json.decode(whole)
        except msgspec.DecodeError:
            return whole
        held = value.get(INPUT) if isinstance(value, dict) else None
        return held if isinstance(held, str) else whole

    def _read(self) -> str:
        at, told = 0, []
        while at < len(self._held):
            if plain := PLAIN.match(self._held, at):
                told.append(plain[0])
                at = plain.end()
            elif self._held[at] == '"':
                self._over = True
                break
            elif not self._whole_escape(at):
                break
            elif escape := ESCAPE.match(self._held, at):
                told.append(_unescaped(escape[0]))
                at = escape.end()
            else:
                told.append(self._held[at])
                at += 1
        self._held = self._held[at:]
        return "".join(told)

    def _whole_escape(self, at: int) -> bool:
        """Half of a pair of surrogates waits for the other."""
        left = len(self._held) - at
        return (
            left >= LONGEST_ESCAPE
            or (left >= 2 and self._held[at + 1] != "u")
            or (left >= 6 and self._held[at + 2 : at + 4].lower() not in ("d8", "d9", "da", "db"))
        )


def _unescaped(escape: str) -> str:
    try:
        return msgspec.json.decode(f'"{escape}"', type=str)
    except msgspec.DecodeError:
        return escape
