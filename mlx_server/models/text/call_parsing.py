"""Parses tool calls."""

import json
import logging
from collections.abc import Callable
from typing import Any

from mlx_server.events import event

ARGUMENT_KEYS = ("arguments", "parameters")
SEPARATORS = " \t\r\n,;"

Parser = Callable[[str, list[dict[str, Any]]], Any]

log = logging.getLogger("mlx_server.text")


def parse_calls(
    text: str, tools: list[dict[str, Any]], parser: Parser | None
) -> list[tuple[str, str]]:
    """(name, JSON arguments) of all calls in `text`; none if any is garbled. Any family's calls may
    be JSON, since grammars fall back to it; the rest goes to mlx-lm's `parser`.
    """
    calls = _json_calls(text)
    if calls is None and parser is not None:
        try:
            calls = parser(text, tools)
        except Exception as error:  # noqa: BLE001
            # Parsers raise anything on text that is no call.
            log.info(event("tool_call_garbled", kind=type(error).__name__))
            return []
    read = [_call(one) for one in (calls if isinstance(calls, list) else [calls])]
    return [] if None in read else [one for one in read if one is not None]


def _json_calls(text: str) -> list[Any] | None:
    decoder = json.JSONDecoder()
    found: list[Any] = []
    rest = text.strip(SEPARATORS)
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].strip(SEPARATORS)
    return found


def _call(call: Any) -> tuple[str, str] | None:
    if not isinstance(call, dict):
        return None
    call = call.get("function") if isinstance(call.get("function"), dict) else call
    name = call.get("name")
    arguments: Any = next((call[key] for key in ARGUMENT_KEYS if key in call), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None
