"""Whether schemas exclude each other: then `oneOf` means `anyOf`."""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

MAX_REFERENCES = 16


def mutually_exclusive(options: Sequence[Any], root: Any) -> bool:
    """Whether it is plain that no value matches two of `options`: their types, or a required
    property's values, differ. `root` resolves references.
    """
    schemas = [_resolved(option, root) for option in options]
    if not all(isinstance(schema, dict) for schema in schemas):
        return False
    if _types_differ(schemas):
        return True
    objects = all(_types(schema) == {"object"} for schema in schemas)
    shared = set.intersection(*map(_required, schemas)) if objects and schemas else set()
    return any(_values_differ(schemas, name, root) for name in shared)


def plain_pointer(reference: str) -> str:
    return unquote(reference).replace("~1", "/").replace("~0", "~")


def _resolved(schema: Any, root: Any) -> Any:
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for name in reference.removeprefix("#/").split("/"):
            schema = schema.get(plain_pointer(name)) if isinstance(schema, dict) else None
    return schema


def _types_differ(schemas: Sequence[dict[str, Any]]) -> bool:
    return _all_disjoint([_types(schema) for schema in schemas])


def _values_differ(schemas: Sequence[dict[str, Any]], name: str, root: Any) -> bool:
    properties = (schema.get("properties") for schema in schemas)
    named = (one.get(name) if isinstance(one, dict) else None for one in properties)
    return _all_disjoint([_values(_resolved(schema, root)) for schema in named])


def _all_disjoint(sets: Sequence[set[str]]) -> bool:
    return all(sets) and len(set().union(*sets)) == sum(map(len, sets))


def _types(schema: dict[str, Any]) -> set[str]:
    """Empty if unknown; integers count as numbers."""
    types = schema.get("type") or []
    named = set(types if isinstance(types, list) else [types])
    return named - {"integer"} | {"number"} if "integer" in named else named


def _required(schema: dict[str, Any]) -> set[str]:
    required = schema.get("required")
    return set(map(str, required)) if isinstance(required, list) else set()


def _values(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    # Fractions and objects have several spellings.
    if not isinstance(values, list) or not all(type(v) in (str, int, bool) for v in values):
        return set()
    return set(map(json.dumps, values))
