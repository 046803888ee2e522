"""Schemas that are enforced in full: each limit is kept or refused. llguidance, which compiles
them, ignores keywords it does not know or the draft lacks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_server.models.text.grammars.disjoint import mutually_exclusive, plain_pointer
from mlx_server.models.text.grammars.patterns import agreed

KEPT = frozenset(
    {
        "$schema",
        "type",
        "enum",
        "const",
        "minLength",
        "maxLength",
        "pattern",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "required",
    }
)
"""Kept by llguidance, without schemas inside."""
ONE_SCHEMA = frozenset({"additionalProperties", "additionalItems", "items"})
SCHEMA_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
REFUSED = frozenset(
    {
        "$anchor",
        "$dynamicAnchor",
        "$dynamicRef",
        "$recursiveAnchor",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "disallow",
        "divisibleBy",
        "else",
        "extends",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
"""Limits that cannot be enforced."""
UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
MAX_DEPTH = 64
LEAP_YEAR = "[0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00"
DATE = (
    "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-"
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    "|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|({LEAP_YEAR})-02-29"
)
HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{HOUR}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{HOUR})"
EXACT_FORMATS = {
    "date": f"^({DATE})$",
    "time": f"^{TIME}$",
    "date-time": f"^({DATE})T{TIME}$",
}
"""Stricter than llguidance's."""
FORMATS = frozenset({"duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})


class Unkept(Exception):
    """`place` is the part that cannot be enforced, "" for all."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.place = place
        self.reason = reason


def strict_schema(schema: Any) -> Any:
    """For llguidance, without descriptions. Raises Unkept."""
    return _SchemaReader(schema).strict()


def child_place(place: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{place}[{key}]"
    return f"{place}.{key}" if place and key else place or key


def inner_schemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """With their places."""
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key in SCHEMA_LIST and isinstance(value, list):
            for i, item in enumerate(value):
                yield child_place(key, i), item
        elif key in ONE_SCHEMA:
            yield key, value
        elif key in SCHEMAS_BY_NAME:
            for name, item in value.items():
                yield child_place(key, name), item


def patterns(schema: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """With their places, from a strict schema."""
    if isinstance(schema, dict) and "pattern" in schema:
        yield child_place(place, "pattern"), schema["pattern"]
    for inner_place, inner in inner_schemas(schema):
        yield from patterns(inner, child_place(place, inner_place))


@dataclass(frozen=True, slots=True)
class _Node:
    """A subschema: `place` is for people, `pointer` for references."""

    schema: Any
    place: str = ""
    pointer: str = "#"
    depth: int = 0

    def under(self, *keys: str | int) -> "_Node":
        schema, place, pointer = self.schema, self.place, self.pointer
        for key in keys:
            schema, place, pointer = schema[key], child_place(place, key), f"{pointer}/{key}"
        return _Node(schema, place, pointer, self.depth + 1)


class _SchemaReader:
    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._seen: dict[str, Any] = {}
        self._references: list[tuple[str, str]] = []

    def strict(self) -> Any:
        result = self._read(_Node(self._root))
        for place, target in self._references:
            if plain_pointer(target) not in self._seen:
                raise Unkept(place, f"`{target}` names no schema of this document")
        return result

    def _read(self, node: _Node) -> Any:
        schema = node.schema
        if node.depth > MAX_DEPTH:
            raise Unkept(node.place, f"schemas may be {MAX_DEPTH} levels deep")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise Unkept(node.place, "a schema must be an object or a bool")
        result: dict[str, Any] = {}
        self._seen[node.pointer] = result
        for key in schema:
            self._read_keyword(result, node, key)
        return result

    def _read_keyword(self, result: dict[str, Any], node: _Node, key: str) -> None:
        value, here = node.schema[key], child_place(node.place, key)
        if key in REFUSED or (key == "uniqueItems" and value is not False):
            raise Unkept(here, f"`{key}` cannot be kept")
        if key in SCHEMA_LIST and isinstance(value, list):
            # `format` may have added to `allOf`.
            inner = [self._read(node.under(key, i)) for i in range(len(value))]
            if key == "oneOf" and mutually_exclusive(value, self._root):
                result.setdefault("allOf", []).append({"anyOf": inner})
            else:
                result.setdefault(key, []).extend(inner)
        elif key in ONE_SCHEMA:
            result[key] = self._read(node.under(key))
        elif key in SCHEMAS_BY_NAME:
            if not isinstance(value, dict):
                raise Unkept(here, "must be an object")
            _check_texts(list(value), here)
            read_name = agreed if key == "patternProperties" else str
            result[key] = {read_name(name): self._read(node.under(key, name)) for name in value}
        elif key == "$ref":
            self._references.append((here, str(value)))
            result[key] = value
        elif key == "$id" and node.place:
            raise Unkept(here, "`$id` is possible for the whole schema only")
        elif key == "format":
            _add_format(result, node.schema, value, here)
        elif key in KEPT:
            _check_value(node.schema, key, value, here)
            result[key] = agreed(value) if key == "pattern" and isinstance(value, str) else value


def _add_format(result: dict[str, Any], schema: dict[str, Any], value: Any, place: str) -> None:
    types = schema.get("type", "string")
    if "string" not in (types if isinstance(types, list) else [types]):
        return
    if value in EXACT_FORMATS:
        result.setdefault("allOf", []).append({"pattern": EXACT_FORMATS[value]})
    elif value in FORMATS:
        result["format"] = value
    else:
        raise Unkept(place, f"the format `{value}` cannot be kept")


def _check_value(schema: dict[str, Any], key: str, value: Any, place: str) -> None:
    if key in ("const", "enum", "required"):
        _check_texts(value, place)
    # Keys that `properties` lacks may repeat, so they cannot be counted.
    if key == "minProperties" and isinstance(value, int):
        required = schema.get("required")
        if value - (len(required) if isinstance(required, list) else 0) > 1:
            raise Unkept(place, "`minProperties` beyond the required properties cannot be kept")


def _check_texts(value: Any, place: str) -> None:
    """Raises Unkept for control characters without a short JSON escape."""
    if isinstance(value, str) and UNWRITABLE.search(value):
        raise Unkept(place, "control characters cannot be written")
    for inner in value if isinstance(value, list) else ():
        _check_texts(inner, place)
    for name, inner in value.items() if isinstance(value, dict) else ():
        _check_texts([name, inner], place)
