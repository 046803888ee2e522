"""Arguments get the types of the tool's schema, and what fits none stays as it came."""

from typing import Any

import pytest

from mlx_server.models.text.parsing.coercion import Untyped, coerced
from mlx_server.models.text.parsing.literals import LiteralReader, read_whole

NULL = {"type": "null"}
INTEGER = {"type": "integer"}
POINT = {"type": "object", "properties": {"x": INTEGER, "label": {"type": "string"}}}


def of(value: Any, schema: Any, **more: Any) -> Any:
    return coerced({"a": value}, {"type": "object", "properties": {"a": schema}, **more})["a"]


def same(value: Any, wanted: Any) -> bool:
    return bool(value == wanted) and type(value) is type(wanted)


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        (INTEGER, "5", 5),
        (INTEGER, " 5\n", 5),
        (INTEGER, "5.0", 5),
        (INTEGER, str(10**30), 10**30),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "0.5", 0.5),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        (NULL, "None", None),
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "\n two\nlines ", "\n two\nlines "),
        ({"anyOf": [INTEGER, NULL]}, "5", 5),
        ({"anyOf": [INTEGER, NULL]}, "null", None),
        ({"anyOf": [INTEGER, NULL]}, "", None),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"type": ["boolean", "null"]}, "false", False),
        ({"type": ["string", "null"]}, "90210", "90210"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "7", 7),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 5}]}, "7", "7"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": INTEGER}]}, "[1]", [1]),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": INTEGER}]}, "['a']", "['a']"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": 3}, "3", 3),
        ({"type": "array"}, "[1, 'b', True]", [1, "b", True]),
        ({"type": "array", "items": INTEGER}, '["1", 2]', [1, 2]),
        (POINT, '{"x": "1", "label": 2}', {"x": 1, "label": "2"}),
        ({"$ref": "#/$defs/point"}, '{"x": "1"}', {"x": 1}),
        ({}, "5", 5),
        ({}, '{"b": []}', {"b": []}),
        ({}, "five", "five"),
        ({"allOf": [INTEGER]}, "5", 5),
        # what fits nothing
        (INTEGER, "2026-01-15", "2026-01-15"),
        (INTEGER, "5.5", 5.5),
        (INTEGER, "[1]", [1]),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "array"}, "[1,", "[1,"),
        (POINT, "[" * 100_000, "[" * 100_000),
        ({"$ref": "#/$defs/nobody"}, "x", "x"),
        ({"type": "thing"}, "x", "x"),
        ({"$ref": "#/properties/a"}, "5", 5),
        (True, "5", 5),
    ],
)
def test_a_text_becomes_what_the_schema_wants(schema: Any, text: str, wanted: Any) -> None:
    value = of(Untyped(text), schema, **{"$defs": {"point": POINT}})
    assert same(value, wanted)
    assert not isinstance(value, Untyped)


@pytest.mark.parametrize(
    ("schema", "given", "wanted"),
    [
        (INTEGER, "5", 5),
        (INTEGER, 5.0, 5),
        (INTEGER, "five", "five"),
        (INTEGER, 5.5, 5.5),
        ({"type": "string"}, 90210, "90210"),
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, {"a": 1}, '{"a": 1}'),
        ({"type": "string"}, None, None),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": "array", "items": {"type": "number"}}, "[1, 2.5]", [1, 2.5]),
        (POINT, {"x": "1", "label": "2", "more": "3"}, {"x": 1, "label": "2", "more": "3"}),
        ({"type": "boolean"}, "true", True),
        ({}, "5", "5"),
    ],
)
def test_a_value_of_another_type_is_mended_where_it_can_be(
    schema: Any, given: Any, wanted: Any
) -> None:
    assert same(of(given, schema), wanted)


@pytest.mark.parametrize("schema", [None, True, "nonsense", {"properties": []}, {"type": "object"}])
def test_a_tool_without_a_usable_schema_takes_anything(schema: Any) -> None:
    assert coerced({"a": Untyped("5"), "b": "5"}, schema) == {"a": 5, "b": "5"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5e1, true, null]}', {"a": [1, -25.0, True, None]}),
        ("{'a': (1, 2,), 'b': None, \"c\": 'it\\'s'}", {"a": [1, 2], "b": None, "c": "it's"}),
        ('"\\u00e4\\ud83e\\udd99\\x41\\n"', "ä🦙A\n"),
        ("1e999", 1.7976931348623157e308),
    ],
)
def test_json_and_python_are_read(text: str, value: Any) -> None:
    assert read_whole(text) == value


@pytest.mark.parametrize(
    "text", ["", "word", "[1", "{a 1}", '"a', "[1 2]", "1 2", "nan", "[" * 5000, "NaN"]
)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_whole(text)


def test_braces_need_no_quotes() -> None:
    text = '{a:<e>x, "y"}<e>,b:[1,<e>z<e>],<e>c d<e>:{e:plain words,f:true}}'
    wanted = {"a": 'x, "y"}', "b": [1, "z"], "c d": {"e": "plain words", "f": True}}
    assert LiteralReader(text, "<e>").value(0) == (wanted, len(text))
