"""Reads a call's arguments in each notation, from where they begin."""

import json
import re
from collections.abc import Callable
from typing import Any

from mlx_server.models.text.parsing.coercion import Untyped
from mlx_server.models.text.parsing.literals import LiteralReader, finite
from mlx_server.models.text.syntax import (
    BracedArguments,
    CallStyle,
    JsonArguments,
    PythonArguments,
    TaggedArguments,
)

Arguments = tuple[dict[str, Any], int]
"""With their end."""
ReadArguments = Callable[[str, int], Arguments]
SPACE = re.compile(r"\s*")
NAME = re.compile(r"\s*([\w-]+)\s*=")


def arguments_reader(style: CallStyle) -> ReadArguments:
    """What reads them raises ValueError."""
    match style.notation:
        case JsonArguments():
            return _read_json
        case PythonArguments():
            return _read_python
        case BracedArguments(escape=escape):
            return lambda text, position: _read_braces(text, position, escape)
        case TaggedArguments() as tags:
            return _TagReader(tags, style.after_arguments).read


def _read_json(text: str, position: int) -> Arguments:
    match = SPACE.match(text, position)
    position = match.end() if match else position
    if not text.startswith("{", position):
        return {}, position
    try:
        value, end = json.JSONDecoder(strict=False, parse_float=finite).raw_decode(text, position)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        value, end = LiteralReader(text).value(position)
    return value, end


def _read_braces(text: str, position: int, escape: str) -> Arguments:
    value, end = LiteralReader(text, escape).value(position)
    if not isinstance(value, dict):
        raise ValueError("braces were expected")
    return value, end


def _read_python(text: str, position: int) -> Arguments:
    reader = LiteralReader(text)
    arguments: dict[str, Any] = {}
    position = reader.skip_space(position)
    while not text.startswith(")", position):
        name = NAME.match(text, position)
        if name is None:
            raise ValueError("a named argument was expected")
        arguments[name[1]], position = reader.value(name.end())
        position = reader.skip_space(position)
        if text.startswith(",", position):
            position = reader.skip_space(position + 1)
        elif not text.startswith(")", position):
            raise ValueError("a comma was expected")
    return arguments, position + 1


class _TagReader:
    def __init__(self, tags: TaggedArguments, call_end: str) -> None:
        self._key = re.compile(tags.key, re.DOTALL)
        self._end = tags.end.strip()
        self._on_lines = tags.end.startswith("\n")
        stops = [self._key.pattern, *([re.escape(call_end)] if call_end else [])]
        self._unclosed = re.compile("|".join(f"(?:{stop})" for stop in stops), re.DOTALL)

    def read(self, text: str, position: int) -> Arguments:
        arguments: dict[str, Any] = {}
        position = self._skip_space(text, position)
        if text.startswith("{", position):
            return _read_json(text, position)
        while (key := self._key.match(text, position)) is not None:
            value, position = self._value(text, key.end())
            kind = key.groupdict().get("kind")
            arguments[key["key"].strip()] = value if kind == "true" else Untyped(value)
            position = self._skip_space(text, position)
        return arguments, position

    def _value(self, text: str, position: int) -> tuple[str, int]:
        """Ends with its tag, or before the next if that is missing."""
        end = text.find(self._end, position)
        next_key = self._key.search(text, position, end if end >= 0 else len(text))
        if next_key is not None:
            end, after = next_key.start(), next_key.start()
        elif end >= 0:
            after = end + len(self._end)
        else:
            stop = self._unclosed.search(text, position)
            end = after = stop.start() if stop else len(text)
        value = text[position:end]
        return value.removesuffix("\n") if self._on_lines else value, after

    def _skip_space(self, text: str, position: int) -> int:
        match = SPACE.match(text, position)
        return match.end() if match else position
