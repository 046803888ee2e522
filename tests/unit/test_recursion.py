"""Schemas that refer to themselves: kept where an answer can end, refused where none can."""

import time
from typing import Any

import pytest

from mlx_server.errors import BadRequest
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.grammars.recursion import ending_schema
from mlx_server.schemas.internal import Constraint, TextPrompt, ToolUse
from tests.unit.test_grammars import accepts, tiny_adapter, user


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


SELF = {"$ref": "#"}
ENDLESS: list[tuple[dict[str, Any], str]] = [
    (SELF, ""),
    (closed("child", child=SELF), "properties.child"),
    (closed("text", "child", text={"type": "string"}, child=SELF), "properties.child"),
    ({"type": "array", "items": SELF, "minItems": 1}, "items"),
    ({"type": "array", "prefixItems": [SELF], "minItems": 1}, "prefixItems[0]"),
    ({"type": "object", "additionalProperties": SELF, "minProperties": 1}, "additionalProperties"),
    (closed("a", a={"anyOf": [SELF, {"type": "array", "items": SELF, "minItems": 2}]}), ""),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ""),
    (
        closed(branch={"$ref": "#/$defs/a"})
        | {"$defs": {"a": closed("b", b={"$ref": "#/$defs/a"})}},
        "$defs.a.properties.b",
    ),
    (
        {
            "anyOf": [{"type": "null"}, {"$ref": "#/definitions/a"}],
            "definitions": {"a": closed("b", b={"$ref": "#/definitions/a"})},
        },
        "definitions.a.properties.b",
    ),
]
ENDING: list[tuple[dict[str, Any], str]] = [
    (closed("child", child={"anyOf": [{"type": "null"}, SELF]}), '{"child": {"child": null}}'),
    (closed("of", of={"type": "array", "items": SELF}), '{"of": [{"of": []}, {"of": []}]}'),
    (closed(child=SELF), '{"child": {"child": {}}}'),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": SELF}]}, "[1, [2, []]]"),
    (
        {
            "$ref": "#/$defs/sum",
            "$defs": {
                "sum": closed("a", "b", a={"$ref": "#/$defs/term"}, b={"$ref": "#/$defs/term"}),
                "term": {"anyOf": [{"$ref": "#/$defs/sum"}, {"type": "integer"}]},
            },
        },
        '{"a": {"a": 1, "b": 2}, "b": 3}',
    ),
    (closed("a", a={"type": ["object", "null"], "required": ["b"]}), '{"a": null}'),
    ({"type": "integer", "$defs": {"unused": {"$ref": "#/$defs/unused"}}}, "7"),
    ({"enum": [1], "$defs": {"a": closed("b", b={"$ref": "#/$defs/a"})}}, "1"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(tmp_path_factory.mktemp("recursion"), "generic")


def grammar_of(adapter: Adapter, kind: Any, value: Any) -> str | None:
    return adapter.prepare(TextPrompt(""), Constraint(kind, value, "guided_json")).grammar


@pytest.mark.parametrize(("schema", "place"), ENDLESS)
def test_recursion_without_a_way_out_is_refused_by_its_place(
    adapter: Adapter, schema: dict[str, Any], place: str
) -> None:
    with pytest.raises(BadRequest, match="no way out") as refused:
        grammar_of(adapter, "json_schema", schema)
    assert refused.value.param == "guided_json"
    assert f"`{place}`" in refused.value.message or not place


@pytest.mark.parametrize(("schema", "value"), ENDING)
def test_recursion_with_a_way_out_is_kept(
    adapter: Adapter, schema: dict[str, Any], value: str
) -> None:
    assert accepts(adapter, grammar_of(adapter, "json_schema", schema), value)


@pytest.mark.parametrize("schema", [schema for schema, _ in ENDLESS if "properties" in schema])
def test_arguments_without_an_end_are_refused_where_they_are_bound(
    adapter: Adapter, schema: dict[str, Any]
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(BadRequest, match=r"`tools\[0\]\.function\.parameters.*no way out"):
        adapter.prepare(user("Hi", use=ToolUse(tools, "required")), None)
    assert adapter.prepare(user("Hi", use=ToolUse(tools)), None).grammar is None


def test_a_grammar_that_must_go_on_for_ever_is_refused(adapter: Adapter) -> None:
    for grammar in ('start: "a" start', 'root ::= "(" root ")"'):
        with pytest.raises(BadRequest, match="no end"):
            grammar_of(adapter, "grammar", grammar)
    assert accepts(adapter, grammar_of(adapter, "grammar", 'start: "a" start | "b"'), "aab")


@pytest.mark.parametrize("wrong", [{"required": 5}, {"required": [[]]}, {"minProperties": "1"}])
def test_what_is_no_schema_is_no_trouble(wrong: dict[str, Any]) -> None:
    ending_schema({"type": "object", "properties": {"a": SELF}} | wrong)


def test_long_chains_of_references_are_followed_in_linear_time() -> None:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(8000)}
    started = time.process_time()
    ending_schema({"$ref": "#/$defs/a0", "$defs": links | {"a8000": {"type": "integer"}}})
    many = [{"$ref": "#/$defs/a"}] * 8000
    ending_schema({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [*many, {"type": "null"}]}}})
    assert time.process_time() - started < 5
