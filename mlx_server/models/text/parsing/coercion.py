"""Arguments as a tool's schema wants them: values that come as text, and texts that come as values.
What does not fit stays as it came.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from mlx_server.models.text.parsing.literals import read_json, read_whole

MAX_DEPTH = 32
ALL = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
BRANCHES = ("anyOf", "oneOf")
NOTHING = object()
NAMES: dict[type, str] = {str: "string", list: "array", dict: "object"}


class Untyped(str):
    """A value as a notation without types has it."""

    __slots__ = ()


def coerced(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    root = schema if isinstance(schema, dict) else {}
    properties = _Schema(root, root).property_schemas()
    return {
        name: _fit(value, _Schema(properties.get(name, {}), root), 0)
        for name, value in arguments.items()
    }


class _Schema:
    """A subschema of `root`, with its reference resolved."""

    def __init__(self, schema: Any, root: Any) -> None:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = _resolved(str(schema["$ref"]), root)
        self.schema: dict[str, Any] = schema if isinstance(schema, dict) else {}
        self.root = root

    def at(self, schema: Any) -> "_Schema":
        return _Schema(schema, self.root)

    def branches(self) -> list["_Schema"]:
        inner = [one for key in BRANCHES for one in _listed(self.schema.get(key))]
        return [self.at(one) for one in inner]

    def kinds(self, depth: int = 0) -> frozenset[str]:
        schema = self.schema
        kinds = ALL
        if "type" in schema:
            kinds = frozenset(one for one in _listed(schema["type"]) if isinstance(one, str)) & ALL
        elif "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            kinds = frozenset().union(*(kinds_of(value) for value in values))
        elif "properties" in schema:
            kinds = frozenset({"object"})
        if depth < MAX_DEPTH:
            if branches := self.branches():
                kinds &= frozenset().union(*(one.kinds(depth + 1) for one in branches))
            for one in _listed(schema.get("allOf")):
                kinds &= self.at(one).kinds(depth + 1)
        if schema.get("nullable") is True:
            kinds |= {"null"}
        return kinds or ALL

    def property_schemas(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in [self, *self.branches(), *map(self.at, _listed(self.schema.get("allOf")))]:
            properties = one.schema.get("properties")
            if isinstance(properties, dict):
                found = {**properties, **found}
        return found

    def items(self) -> Any:
        for one in [self, *self.branches()]:
            if isinstance(one.schema.get("items"), dict):
                return one.schema["items"]
        return {}


def _fit(value: Any, schema: _Schema, depth: int) -> Any:
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, Untyped):
        return _fit_untyped(value, schema, depth)
    kinds = schema.kinds()
    if isinstance(value, dict) and "object" in kinds:
        properties = schema.property_schemas()
        extra = schema.schema.get("additionalProperties", {})
        return {
            key: _fit(inner, schema.at(properties.get(key, extra)), depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list) and "array" in kinds:
        items = schema.at(schema.items())
        return [_fit(inner, items, depth + 1) for inner in value]
    if kinds & kinds_of(value):
        return value
    if isinstance(value, str):
        read = _read_as(value, kinds)
        return value if read is NOTHING else _fit(read, schema, depth + 1)
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return int(value)
    if "string" in kinds and value is not None:
        return json.dumps(value, ensure_ascii=False)
    return value


def _fit_untyped(text: str, schema: _Schema, depth: int) -> Any:
    kinds = schema.kinds()
    plain = str(text)
    if kinds == ALL:
        return _anything(plain)
    if kinds == {"string"}:
        return plain
    read = _read_as(plain, kinds - {"string"})
    if "string" in kinds:
        return read if read is not NOTHING and allows(schema, read) else plain
    if not plain.strip() and "null" in kinds:
        return None
    return _anything(plain) if read is NOTHING else _fit(read, schema, depth + 1)


def _read_as(text: str, kinds: frozenset[str]) -> Any:
    """`text` as a value of one of `kinds`, or NOTHING."""
    try:
        value = read_whole(text.strip())
    except ValueError:
        return NOTHING
    if isinstance(value, float) and "number" not in kinds and value.is_integer():
        value = int(value)
    return value if kinds & kinds_of(value) else NOTHING


def _anything(text: str) -> Any:
    try:
        value = read_json(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def allows(schema: _Schema, value: Any, depth: int = 0) -> bool:
    """Whether the usual keywords do."""
    if depth > MAX_DEPTH:
        return True
    limits = schema.schema
    if not schema.kinds() & kinds_of(value):
        return False
    if "enum" in limits and not any(_same(value, one) for one in _listed(limits["enum"])):
        return False
    if "const" in limits and not _same(value, limits["const"]):
        return False
    if not _within(limits, value):
        return False
    if (branches := schema.branches()) and not any(
        allows(one, value, depth + 1) for one in branches
    ):
        return False
    if isinstance(value, list):
        items = schema.at(limits.get("items"))
        return all(allows(items, one, depth + 1) for one in value)
    if isinstance(value, dict):
        properties = limits.get("properties") or {}
        known = all(
            allows(schema.at(properties[key]), one, depth + 1)
            for key, one in value.items()
            if key in properties
        )
        closed = limits.get("additionalProperties") is False and value.keys() - properties.keys()
        return known and not closed and value.keys() >= set(_listed(limits.get("required")))
    return True


def _within(limits: dict[str, Any], value: Any) -> bool:
    if isinstance(value, str):
        pattern = limits.get("pattern")
        fits = pattern is None or _searches(pattern, value)
        return fits and _between(limits, "minLength", len(value), "maxLength")
    if isinstance(value, list):
        return _between(limits, "minItems", len(value), "maxItems")
    if isinstance(value, dict):
        return _between(limits, "minProperties", len(value), "maxProperties")
    if isinstance(value, bool) or value is None:
        return True
    low, high = limits.get("exclusiveMinimum"), limits.get("exclusiveMaximum")
    return (
        _between(limits, "minimum", value, "maximum")
        and (not _number(low) or value > low)
        and (not _number(high) or value < high)
    )


def _between(limits: dict[str, Any], low: str, value: float, high: str) -> bool:
    least, most = limits.get(low), limits.get(high)
    return not (_number(least) and value < least) and not (_number(most) and value > most)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _searches(pattern: Any, text: str) -> bool:
    try:
        return re.search(str(pattern), text) is not None
    except re.error:
        return True


def kinds_of(value: Any) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    if isinstance(value, float):
        return frozenset({"number"})
    kind = NAMES.get(type(value), "null")
    return frozenset({kind})


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _resolved(reference: str, root: Any) -> Any:
    node = root
    for part in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        key = part.replace("~1", "/").replace("~0", "~")
        node = node.get(key) if isinstance(node, dict) else None
    return node
