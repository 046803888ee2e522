"""Refuses schemas whose recursion has no way out: no answer could end.

A schema can end if what its values need can. That spreads from schemas which need nothing to those
that wait for them, in time linear in the schema.
"""

from collections.abc import Iterator
from typing import Any

from mlx_server.models.text.grammars.disjoint import plain_pointer
from mlx_server.models.text.grammars.json_schema import (
    Unkept,
    child_place,
    inner_schemas,
    strict_schema,
)

DEFINITIONS = ("$defs.", "definitions.")
OPTIONS = ("anyOf", "oneOf")
ENDLESS = "this recursion has no way out, so that no answer could end"

Need = list[Any]
"""Schemas of which a value needs one."""


def ending_schema(schema: Any) -> Any:
    """`strict_schema`. Raises Unkept also where it could never end."""
    strict = strict_schema(schema)
    if isinstance(strict, dict):
        _Endings(strict).check()
    return strict


class _Endings:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._places: dict[int, str] = {}
        """Of schemas that an answer may come to, by their `id`, in the order of their finding."""
        self._schemas: list[dict[str, Any]] = []
        self._missing: dict[int, int] = {}
        """Needs of a schema that nothing meets yet."""
        self._waiting: dict[int, list[tuple[int, int]]] = {}
        """By schema: who needs it, as (schema, number of the need)."""
        self._met: set[tuple[int, int]] = set()

    def check(self) -> None:
        self._find(self._root, "")
        for schema in self._schemas:  # grows
            place = self._places[id(schema)]
            for inner_place, inner in inner_schemas(schema):
                if not inner_place.startswith(DEFINITIONS):
                    self._find(inner, child_place(place, inner_place))
            if "$ref" in schema:
                self._find(*self._target(schema["$ref"]))
        for schema in self._schemas:
            self._wait(schema)
        self._spread([id(one) for one in self._schemas if not self._missing[id(one)]])
        for schema in reversed(self._schemas):
            if self._missing[id(schema)] and "$ref" in schema:
                raise Unkept(self._places[id(schema)], ENDLESS)

    def _find(self, schema: Any, place: str) -> None:
        if isinstance(schema, dict) and id(schema) not in self._places:
            self._places[id(schema)] = place
            self._schemas.append(schema)

    def _target(self, reference: str) -> tuple[Any, str]:
        schema: Any = self._root
        place = ""
        for name in map(plain_pointer, reference.removeprefix("#").split("/")[1:]):
            key: Any = int(name) if isinstance(schema, list) else name
            if isinstance(schema, dict) and key not in schema:
                return None, ""  # `oneOf` that became `anyOf`
            schema, place = schema[key], child_place(place, key)
        return schema, place

    def _wait(self, schema: dict[str, Any]) -> None:
        missing = 0
        for number, need in enumerate(self._needs(schema)):
            if all(id(one) in self._places for one in need):
                missing += 1
                for one in need:
                    self._waiting.setdefault(id(one), []).append((id(schema), number))
        self._missing[id(schema)] = missing

    def _needs(self, schema: dict[str, Any]) -> Iterator[Need]:
        if "$ref" in schema:
            yield [self._target(schema["$ref"])[0]]
        for one in schema.get("allOf", ()):
            yield [one]
        for key in OPTIONS:
            if key in schema:
                yield schema[key]
        if "const" in schema or "enum" in schema:
            return
        # With several types, one of them is taken to need nothing.
        if schema.get("type") in ("object", ["object"]):
            yield from _needs_of_object(schema)
        elif schema.get("type") in ("array", ["array"]):
            yield from _needs_of_array(schema)

    def _spread(self, ending: list[int]) -> None:
        while ending:
            for waiting, number in self._waiting.pop(ending.pop(), ()):
                if (waiting, number) not in self._met:
                    self._met.add((waiting, number))
                    self._missing[waiting] -= 1
                    if not self._missing[waiting]:
                        ending.append(waiting)


def _needs_of_object(schema: dict[str, Any]) -> Iterator[Need]:
    properties = schema.get("properties", {})
    named = schema.get("required")
    required = {one for one in named if isinstance(one, str)} if isinstance(named, list) else set()
    others = [*schema.get("patternProperties", {}).values()]
    others.append(schema.get("additionalProperties", True))
    for name in required:
        yield [properties[name]] if name in properties else others
    if _count(schema, "minProperties") > len(required):
        yield [*(one for name, one in properties.items() if name not in required), *others]


def _needs_of_array(schema: dict[str, Any]) -> Iterator[Need]:
    items = schema.get("items", True)
    first = items if isinstance(items, list) else schema.get("prefixItems", [])
    rest = schema.get("additionalItems", True) if isinstance(items, list) else items
    least = _count(schema, "minItems")
    for one in first[:least]:
        yield [one]
    if least > len(first):
        yield [rest]


def _count(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key)
    return value if isinstance(value, int) else 0
