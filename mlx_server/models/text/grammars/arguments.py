"""Grammars of a call's arguments, in JSON or a family's notation."""

import json
import re
from dataclasses import dataclass
from typing import Any

from mlx_server.models.text.grammars.lark import Lark, quoted, text_without
from mlx_server.models.text.syntax import (
    BracedArguments,
    JsonArguments,
    Notation,
    PythonArguments,
    TaggedArguments,
)

OBJECT_KEYS = frozenset({"$schema", "type", "properties", "required", "additionalProperties"})
DEFINITIONS = ("$defs", "definitions")
WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
ANY_WORD = "/[A-Za-z_][A-Za-z0-9_]*/"
ANY_OBJECT = {"type": "object"}
MAX_REFERENCES = 16


class Unwritable(Exception):
    """The notation cannot express a schema: use JSON."""


@dataclass(frozen=True, slots=True)
class Property:
    name: str
    schema: Any
    required: bool


def arguments(lark: Lark, notation: Notation, schema: Any) -> str:
    """`schema` comes from `arguments_schema`. Raises Unwritable."""
    match notation:
        case JsonArguments():
            return lark.schema(schema)
        case TaggedArguments():
            return _Tagged(lark, notation, schema).arguments()
        case PythonArguments():
            return _python(lark, schema)
        case BracedArguments(escape=escape):
            return _Braced(lark, escape, schema).arguments()


class _Tagged:
    def __init__(self, lark: Lark, tags: TaggedArguments, schema: Any) -> None:
        self._lark = lark
        self._tags = tags
        self._schema = schema

    def arguments(self) -> str:
        if self._schema == ANY_OBJECT:
            return f"{self._argument(ANY_WORD, {'type': 'string'})}*"
        arguments = []
        for known in _properties(self._schema):
            argument = self._argument(quoted(known.name), known.schema)
            arguments.append(argument if known.required else f"{argument}?")
        return " ".join(arguments)

    def _argument(self, key: str, schema: Any) -> str:
        lark, tags = self._lark, self._tags
        texts, others = _parted(schema, self._schema)
        values = [f"{lark.exactly(tags.middle)} {self._text(text)}" for text in texts]
        if others is not None:
            middle = tags.middle if tags.middle_json is None else tags.middle_json
            values.append(f"{lark.exactly(middle)} {lark.schema(others)} {lark.exactly(tags.end)}")
        return lark.rule("argument", f"{lark.exactly(tags.start)} {key} ({' | '.join(values)})")

    def _text(self, schema: dict[str, Any]) -> str:
        lark, tags = self._lark, self._tags
        end = tags.end.strip()
        if "enum" in schema:
            if any(end in text or tags.start in text for text in schema["enum"]):
                raise Unwritable
            return f"{_choices(schema)} {lark.exactly(tags.end)}"
        text = text_without(end, tags.start)
        if limits := _length(schema):
            text = f"{limits} & {text}"
        return lark.text_until(tags.end, text)


def _python(lark: Lark, schema: Any) -> str:
    if schema == ANY_OBJECT:
        pair = lark.rule("pair", f'{ANY_WORD} "=" {lark.schema(True)}')
        return f'({pair} (", " {pair})*)?'
    pairs = []
    for one in _properties(schema):
        value = _python_value(lark, one.schema, schema)
        pairs.append((lark.rule("pair", f"{quoted(one.name + '=')} {value}"), one))
    return _joined(lark, pairs, '", "')


def _python_value(lark: Lark, schema: Any, root: Any) -> str:
    if isinstance(schema, dict) and schema == {"type": "boolean"}:
        return '("True" | "False" | "true" | "false")'
    return lark.schema(_standalone(schema, root))


class _Braced:
    """Gemma's; what is no plain text is JSON."""

    def __init__(self, lark: Lark, escape: str, schema: Any) -> None:
        self._lark = lark
        self._escape = escape
        self._schema = schema

    def arguments(self) -> str:
        if self._schema == ANY_OBJECT:
            plain = self._lark.schema({"type": ["number", "boolean", "null"]})
            pair = self._lark.rule("pair", f'{ANY_WORD} ":" ({self._text({})} | {plain})')
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        return self._object(self._schema)

    def _object(self, schema: Any) -> str:
        lark = self._lark
        pairs = [
            (lark.rule("pair", f"{quoted(one.name + ':')} {self._value(one.schema)}"), one)
            for one in _properties(schema)
        ]
        return lark.rule("braces", f'"{{" {_joined(lark, pairs, quoted(","))} "}}"')

    def _value(self, schema: Any) -> str:
        texts, others = _parted(schema, self._schema)
        values = [self._text(text) for text in texts]
        if others is not None:
            values.append(self._other(others))
        return f"({' | '.join(values)})"

    def _other(self, schema: Any) -> str:
        lark = self._lark
        if isinstance(schema, dict) and schema.keys() == {"type", "items"}:
            item = self._value(schema["items"])
            return lark.rule("brackets", f'"[" ({item} ("," {item})*)? "]"')
        try:
            return self._object(schema)
        except Unwritable:
            return lark.schema(schema)

    def _text(self, schema: dict[str, Any]) -> str:
        lark, mark = self._lark, self._lark.exactly(self._escape)
        if "enum" in schema:
            if any(self._escape in text for text in schema["enum"]):
                raise Unwritable
            inside = _choices(schema)
        else:
            limits, text = _length(schema), text_without(self._escape)
            inside = lark.rule("TEXT", f"{limits} & {text}" if limits else text)
        return lark.rule("escaped", f"{mark} {inside} {mark}")


def _joined(lark: Lark, pairs: list[tuple[str, Property]], comma: str) -> str:
    """Pairs in their order, of which some may be left out."""
    first, rest = "", ""
    for pair, one in reversed(pairs):
        alone = lark.rule("first", f"{pair} {rest}")
        if not one.required:
            alone = f"({alone} | {first})" if first else f"{alone}?"
        rest = lark.rule("rest", f"({comma} {pair}){'' if one.required else '?'} {rest}")
        first = alone
    return first


def _properties(schema: Any) -> list[Property]:
    closed = isinstance(schema, dict) and schema.get("additionalProperties") is False
    if not closed or schema.get("type") != "object":
        raise Unwritable
    if not schema.keys() <= {*OBJECT_KEYS, *DEFINITIONS}:
        raise Unwritable
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if not set(required) <= properties.keys() or not all(map(WORD.fullmatch, properties)):
        raise Unwritable
    return [Property(name, inner, name in required) for name, inner in properties.items()]


def _parted(schema: Any, root: Any) -> tuple[list[dict[str, Any]], Any]:
    """The schemas of plain texts, and one for all else, or None. Raises Unwritable for texts with
    limits that a plain text cannot be held to.
    """
    texts: list[dict[str, Any]] = []
    others: list[Any] = []
    for branch in _branches(schema, root):
        kinds = branch.get("type") if isinstance(branch, dict) else None
        if "enum" in branch and kinds in (None, "string"):
            named = [one for one in branch["enum"] if isinstance(one, str)]
            texts += [{"enum": named}] if named else []
            if rest := [one for one in branch["enum"] if not isinstance(one, str)]:
                others.append({"enum": rest})
        elif kinds == "string":
            if not branch.keys() <= {"type", "minLength", "maxLength"}:
                raise Unwritable
            texts.append(branch)
        elif kinds is None:
            raise Unwritable
        else:
            others.append(_standalone(branch, root))
    if len(others) > 1:
        return texts, {**_definitions(root), "anyOf": [_bare(one) for one in others]}
    return texts, others[0] if others else None


def _branches(schema: Any, root: Any, depth: int = 0) -> list[Any]:
    """The alternatives of a schema, each with one type or an enum."""
    if depth > MAX_REFERENCES or not isinstance(schema, dict):
        raise Unwritable
    if "$ref" in schema:
        return _branches(_referred(schema, root), root, depth + 1)
    if "const" in schema and isinstance(schema["const"], str):
        return [{"enum": [schema["const"]]}]
    if schema.keys() == {"anyOf"}:
        return [one for inner in schema["anyOf"] for one in _branches(inner, root, depth + 1)]
    if isinstance(schema.get("type"), list):
        return [
            one
            for kind in schema["type"]
            for one in _branches(_of_type(schema, kind), root, depth + 1)
        ]
    return [schema]


def _of_type(schema: dict[str, Any], kind: str) -> dict[str, Any]:
    one = {**schema, "type": kind}
    if kind == "null":
        return {"type": "null"}
    if "enum" in one and kind == "string":
        return {"enum": [value for value in one["enum"] if isinstance(value, str)]}
    return one


def _referred(schema: dict[str, Any], root: Any) -> Any:
    place, _, name = str(schema["$ref"]).removeprefix("#/").partition("/")
    if schema.keys() != {"$ref"} or place not in DEFINITIONS or name not in root.get(place, {}):
        raise Unwritable
    return root[place][name]


def _standalone(schema: Any, root: Any) -> Any:
    """With the definitions that it refers to. Raises Unwritable for other references."""
    text = json.dumps(schema)
    if '"$ref"' not in text:
        return schema
    references = re.findall(r'"\$ref": "([^"]*)"', text)
    if not isinstance(schema, dict) or not all(
        one.startswith(("#/$defs/", "#/definitions/")) for one in references
    ):
        raise Unwritable
    return {**_definitions(root), **schema}


def _definitions(root: Any) -> dict[str, Any]:
    return {key: root[key] for key in DEFINITIONS if key in root}


def _bare(schema: Any) -> Any:
    return {key: value for key, value in schema.items() if key not in DEFINITIONS}


def _choices(schema: dict[str, Any]) -> str:
    return f"({' | '.join(json.dumps(text, ensure_ascii=False) for text in schema['enum'])})"


def _length(schema: dict[str, Any]) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not least and most is None:
        return ""
    return f"/(?s:.{{{least},{'' if most is None else most}}})/"
