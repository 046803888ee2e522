"""Grammars of a call's arguments, in JSON or a family's notation."""

import re
from typing import Any

from mlx_server.models.text.grammars.lark import Lark, quoted, text_without
from mlx_server.models.text.syntax import ArgumentNotation

OBJECT_KEYS = frozenset({"$schema", "type", "properties", "required", "additionalProperties"})
PLAIN_TYPES = frozenset({"integer", "number", "boolean", "null"})
LARGEST = 10**15
"""Parsers that read integers as floats keep digits up to here."""
WORD = re.compile(r"\w+", re.ASCII)
NULL = re.compile(r"\s*null\s*", re.IGNORECASE)
PARAMETER_END = "\n</parameter>\n"


class Unwritable(Exception):
    """The notation cannot express a schema, or mlx-lm cannot read it back: use JSON."""


def arguments(lark: Lark, notation: ArgumentNotation, schema: Any) -> str:
    """`schema` comes from `arguments_schema`. Raises Unwritable."""
    match notation:
        case "json":
            return json_arguments(lark, schema)
        case "qwen-xml":
            return _xml_arguments(lark, schema)
        case "gemma":
            return _Escaped(lark, '<|"|>', flat=False).object(schema)
        case "function-gemma":
            return _Escaped(lark, "<escape>", flat=True).object(schema)


def json_arguments(lark: Lark, schema: Any) -> str:
    return lark.schema(schema)


def _xml_arguments(lark: Lark, schema: Any) -> str:
    """`<parameter=name>`, the value as text or JSON, `</parameter>`, each on its own line."""
    parameters = []
    for name, inner, required in _properties(schema):
        start = quoted(f"<parameter={name}>\n")
        one = lark.rule("parameter", f"{start} {_xml_value(lark, inner)}")
        parameters.append(one if required else f"{one}?")
    return " ".join(parameters)


class _Escaped:
    """Gemma's `{name:value,...}` with texts between two `escape`; `flat` forbids nesting."""

    def __init__(self, lark: Lark, escape: str, flat: bool) -> None:
        self._lark = lark
        self._escape = escape
        self._flat = flat

    def object(self, schema: Any) -> str:
        first, rest = "", ""
        for name, inner, required in reversed(_properties(schema)):
            pair = self._lark.rule("pair", f"{quoted(name + ':')} {self._value(inner)}")
            alone = self._lark.rule("first", f"{pair} {rest}")
            if not required:
                alone = f"({alone} | {first})" if first else f"{alone}?"
            rest = self._lark.rule("rest", f'("," {pair}){"" if required else "?"} {rest}')
            first = alone
        return self._lark.rule("braces", f'"{{" {first} "}}"')

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, dict):
            raise Unwritable
        kind = schema.get("type")
        if "enum" in schema and all(isinstance(one, str) for one in schema["enum"]):
            return self._one_of(schema["enum"])
        if kind == "string" and schema.keys() <= {"type"}:
            unwritable = ["\0", self._escape, *("}" if self._flat else "")]
            return self._between(self._lark.rule("TEXT", text_without(*unwritable)))
        if kind in PLAIN_TYPES:
            return self._lark.schema(_bounded(schema))
        if self._flat:
            raise Unwritable
        if kind == "array" and schema.keys() <= {"type", "items"} and "items" in schema:
            item = self._value(schema["items"])
            return self._lark.rule("brackets", f'"[" ({item} ("," {item})*)? "]"')
        return self.object(schema)

    def _one_of(self, texts: list[str]) -> str:
        if any(self._escape in text or "\0" in text or "}" in text for text in texts):
            raise Unwritable
        return self._between(f"({' | '.join(quoted(text) for text in texts)})")

    def _between(self, inside: str) -> str:
        mark = self._lark.exactly(self._escape)
        return self._lark.rule("escaped", f"{mark} {inside} {mark}")


def _properties(schema: Any) -> list[tuple[str, Any, bool]]:
    closed = isinstance(schema, dict) and schema.get("additionalProperties") is False
    if not closed or schema.get("type") != "object" or not schema.keys() <= OBJECT_KEYS:
        raise Unwritable
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if not set(required) <= properties.keys() or not all(map(WORD.fullmatch, properties)):
        raise Unwritable
    return [(name, inner, name in required) for name, inner in properties.items()]


def _xml_value(lark: Lark, schema: Any) -> str:
    """Includes the end tag; text is raw, anything else JSON."""
    if not isinstance(schema, dict):
        raise Unwritable
    kind = schema.get("type")
    if kind == "string" and schema.keys() <= {"type"}:
        # mlx-lm reads "null" in any case as None.
        text = f"{text_without('</')} & ~/\\s*(?i:null)\\s*/"
        return lark.rule("value", f"{lark.rule('TEXT', text)} {quoted(PARAMETER_END)}", "[lazy]")
    if "enum" in schema and all(isinstance(one, str) for one in schema["enum"]):
        return f"({' | '.join(map(_xml_choice, schema['enum']))}) {quoted(PARAMETER_END)}"
    if kind in PLAIN_TYPES or kind in ("array", "object"):
        return f"{lark.schema(_bounded(schema))} {quoted(PARAMETER_END)}"
    raise Unwritable


def _xml_choice(text: str) -> str:
    if "</" in text or NULL.fullmatch(text) or text != text.strip("\n"):
        raise Unwritable
    return quoted(text) or '""'


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") not in ("integer", "number"):
        return schema
    bounds = {"minimum": -LARGEST, "maximum": LARGEST}
    return bounds | schema
