"""Parses blocks of calls."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

from mlx_server.events import event
from mlx_server.models.text.parsing.arguments import arguments_reader
from mlx_server.models.text.parsing.coercion import coerced
from mlx_server.models.text.parsing.literals import finite, read_whole
from mlx_server.models.text.styles.headed_calls import LFM2
from mlx_server.models.text.syntax import CallStyle, PythonArguments

NAME_KEYS = ("name", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args")
FENCES = re.compile(r"\s*```(?:json|python|tool_code)?\s*|\s*```\s*")
SEPARATORS = " \t\r\n,;"
GAP = re.compile(r"[\s,;]*")
LIST_GAP = re.compile(r"[\s,;\[\]]*")

Parser = Callable[[str, list[dict[str, Any]]], Any]
Read = tuple[str, dict[str, Any]]

log = logging.getLogger("mlx_server.text")


def parse_calls(
    text: str, tools: list[dict[str, Any]], style: CallStyle | None, parser: Parser | None
) -> list[tuple[str, str]]:
    """(name, JSON arguments) of all calls in `text`; none if any is garbled. Any style's calls may
    be JSON, since grammars fall back to it; `parser` is mlx-lm's, for what no style reads.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    for mark in style.ignored if style else ():
        text = text.replace(mark, " ")
    calls = _json_calls(text, schemas)
    if calls is None and (own := _headed_style(style, parser)):
        calls = _headed_calls(text, own)
    if calls is None and parser is not None:
        calls = _foreign_calls(text, tools, parser)
    return [_written(name, coerced(given, schemas.get(name))) for name, given in calls or ()]


def _headed_style(style: CallStyle | None, parser: Parser | None) -> CallStyle | None:
    """Models that shall write JSON write Python at times."""
    if style is not None and style.header:
        return style
    return LFM2 if parser is None or (style and style.syntax.json) else None


def _written(name: str, arguments: dict[str, Any]) -> tuple[str, str]:
    return name, json.dumps(arguments, ensure_ascii=False)


def _json_calls(text: str, schemas: dict[str, Any]) -> list[Read] | None:
    """None if `text` is not JSON; empty if any is no call."""
    decoder = json.JSONDecoder(strict=False, parse_float=finite)
    found: list[Any] = []
    rest = FENCES.sub("\n", text).strip(SEPARATORS)
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].strip(SEPARATORS)
    read = [_call(one, schemas) for one in found]
    return [] if None in read else [one for one in read if one is not None]


def _foreign_calls(text: str, tools: list[dict[str, Any]], parser: Parser) -> list[Read]:
    try:
        calls = parser(text, tools)
    except Exception as error:  # noqa: BLE001
        # Parsers raise anything on text that is no call.
        log.info(event("tool_call_garbled", kind=type(error).__name__))
        return []
    read = [_call(one, {}) for one in (calls if isinstance(calls, list) else [calls])]
    return [] if None in read else [one for one in read if one is not None]


def _call(call: Any, schemas: dict[str, Any]) -> Read | None:
    if not isinstance(call, dict):
        return None
    if len(call) == 1 and (name := next(iter(call))) in schemas:
        call = {"name": name, "arguments": call[name]}
    call = call.get("function") if isinstance(call.get("function"), dict) else call
    name = next((call[key] for key in NAME_KEYS if key in call), None)
    arguments: Any = next((call[key] for key in ARGUMENT_KEYS if key in call), {})
    if isinstance(arguments, str):
        try:
            arguments = read_whole(arguments.strip() or "{}")
        except ValueError:
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return (name, arguments) if _is_json(arguments) else None


def _headed_calls(text: str, style: CallStyle) -> list[Read]:
    try:
        calls = list(_headed(text, style))
    except (ValueError, RecursionError) as error:
        log.info(event("tool_call_garbled", kind=type(error).__name__))
        return []
    return calls if all(_is_json(arguments) for _, arguments in calls) else []


def _headed(text: str, style: CallStyle) -> Iterator[Read]:
    """Headers with a tag of their own are looked for; others must come at once."""
    header, read = re.compile(style.header, re.DOTALL), arguments_reader(style)
    seek = header.search if style.before_name else header.match
    gap = LIST_GAP if isinstance(style.notation, PythonArguments) else GAP
    position = _after(gap, text, 0)
    while (match := seek(text, position)) is not None:
        arguments, position = read(text, match.end())
        if not isinstance(arguments, dict):
            raise ValueError("arguments must be an object")
        yield match["name"].strip(), arguments
        position = _after(gap, text, position)
    if not style.before_name and position < len(text):
        raise ValueError("something follows")


def _after(gap: re.Pattern[str], text: str, position: int) -> int:
    match = gap.match(text, position)
    assert match is not None
    return match.end()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True
