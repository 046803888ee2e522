"""A hundred JSON schemas such as clients send, and some that no grammar can keep."""

from typing import Any

Schema = dict[str, Any]


def record(required: list[str] | None = None, /, **properties: Any) -> Schema:
    """A closed object; all its properties are required unless told otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def text(**more: Any) -> Schema:
    return {"type": "string", **({"maxLength": 24} | more)}


def number(**more: Any) -> Schema:
    return {"type": "number", **({"minimum": -1000, "maximum": 1000} | more)}


def integer(**more: Any) -> Schema:
    return {"type": "integer", **({"minimum": -1000, "maximum": 1000} | more)}


def some(items: Any, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def either(*schemas: Any) -> Schema:
    return {"anyOf": list(schemas)}


FLAG: Schema = {"type": "boolean"}
NOTHING: Schema = {"type": "null"}
POINT = record(x=number(), y=number())

SCALARS: list[Schema] = [
    text(),
    text(minLength=3, maxLength=8),
    text(pattern="^[A-Z]{3}-[0-9]{4}$"),
    text(pattern="^(red|green|blue)( light)?$"),
    text(pattern="^\\+?[0-9]{6,12}$"),
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "email", "maxLength": 40},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "hostname"},
    {"type": "string", "format": "duration"},
    integer(),
    integer(minimum=1, maximum=6),
    integer(exclusiveMinimum=-5, exclusiveMaximum=5),
    integer(minimum=0, maximum=1000, multipleOf=5),
    integer(minimum=-3, maximum=-1),
    number(),
    number(minimum=0, maximum=1),
    number(exclusiveMinimum=0, maximum=99.5),
    FLAG,
    NOTHING,
    {"const": "fixed"},
    {"const": 42},
    {"const": {"kind": "none", "items": [1, 2, None]}},
    one_of("small", "medium", "large"),
    one_of(1, 2, "three", None, False),
    one_of('a "quoted" word', "a back\\slash", "naïve café", "two\nlines"),
    {"type": ["string", "null"], "maxLength": 10},
    {"type": ["integer", "boolean"], "minimum": 0, "maximum": 9},
]

ARRAYS: list[Schema] = [
    some(text(maxLength=8)),
    some(integer(), 2, 2),
    some(FLAG, 1, 5),
    some(one_of("n", "e", "s", "w"), 1, 4),
    some(some(integer(minimum=0, maximum=9), 2, 2), 2, 2),
    some(POINT, 1, 2),
    some(either(text(maxLength=6), integer()), 1, 4),
    {"type": "array", "prefixItems": [text(maxLength=6), integer()], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [FLAG], "items": integer(), "minItems": 1, "maxItems": 3},
    some({"type": "string", "format": "date"}, 1, 2),
    some(NOTHING, 0, 2),
    some({"const": "x"}, 3, 3),
]

OBJECTS: list[Schema] = [
    record(),
    record(name=text(), age=integer(minimum=0, maximum=120)),
    record(["name"], name=text(), nickname=text(), email=text()),
    record([], a=integer(), b=FLAG, c=text(maxLength=5)),
    record(["b", "d"], a=integer(), b=FLAG, c=text(maxLength=5), d=NOTHING, e=number()),
    record(user=record(name=text(), address=record(street=text(), city=text()))),
    record(a=record(b=record(c=record(d=record(e=integer()))))),
    record(items=some(record(sku=text(pattern="^[A-Z]{2}[0-9]{3}$"), count=integer(minimum=1)), 1)),
    record(title=text(), tags=some(text(maxLength=8), 0, 4), draft=FLAG),
    record(start={"type": "string", "format": "date-time"}, minutes=integer(minimum=5, maximum=90)),
    record(shape=one_of("circle", "square"), size=number(minimum=0), at=POINT),
    record(route=some(POINT, 2, 3)),
    record(value=either(text(maxLength=8), integer(), NOTHING)),
    record(version={"const": "1.0"}, ok={"const": True}),
    record(matrix=some(some(number(), 2, 2), 2, 2)),
    record(**{"with space": text(), "with-dash": integer(), "naïve": FLAG, 'quo"te': NOTHING}),
    record(**{f"field_{i}": integer(minimum=0, maximum=9) for i in range(20)}),
    record([f"o{i}" for i in range(0, 12, 3)], **{f"o{i}": FLAG for i in range(12)}),
    {"type": "object", "additionalProperties": integer(), "properties": {"a": text(maxLength=4)}},
    {
        "type": "object",
        "properties": {"id": integer()},
        "required": ["id"],
        "additionalProperties": FLAG,
    },
    record(when={"type": "string", "format": "date"}, who=some(text(maxLength=8), 1, 2)),
    record(city=text(), country={"type": "string", "pattern": "^[A-Z]{2}$"}, population=integer()),
    record(query=text(), limit=integer(minimum=1, maximum=100), order=one_of("asc", "desc")),
    record(temperature=number(minimum=-60, maximum=60), unit=one_of("C", "F"), windy=FLAG),
    record(rating=integer(minimum=1, maximum=5), review=text(maxLength=40)),
    record(coordinates=some(number(minimum=-180, maximum=180), 2, 2)),
    record(["name"], name=text(), parent=either(record(name=text()), NOTHING)),
]

UNIONS: list[Schema] = [
    either(text(maxLength=10), integer()),
    either(
        record(kind={"const": "cat"}, lives=integer(minimum=1, maximum=9)),
        record(kind={"const": "dog"}, tricks=some(text(maxLength=6), 0, 2)),
    ),
    either(NOTHING, record(error=text())),
    either(some(integer(), 1, 2), record(values=some(integer(), 1, 2))),
    record(
        event=either(
            record(type={"const": "move"}, by=POINT),
            record(type={"const": "stop"}),
            record(type={"const": "say"}, words=text()),
        )
    ),
    some(either(record(i=integer()), record(t=text(maxLength=5))), 1, 3),
    record(id=either(integer(minimum=1), {"type": "string", "format": "uuid"})),
    {"allOf": [record(a=integer())]},
    either(one_of("yes", "no"), record(maybe=text())),
    record(a=either(FLAG, NOTHING), b=either(integer(), FLAG), c=either(text(maxLength=3), FLAG)),
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "boolean"}]},
    {"oneOf": [record(a={"const": 1}), record(a={"const": 2})]},
]

REFERENCES: list[Schema] = [
    {"$defs": {"point": POINT}, **record(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"})},
    {
        "definitions": {"colour": one_of("red", "blue")},
        **record(c={"$ref": "#/definitions/colour"}),
    },
    {"$defs": {"n": integer()}, **some({"$ref": "#/$defs/n"}, 1, 3)},
    {
        "$defs": {"tree": record(["value"], value=integer(), left={"$ref": "#/$defs/tree"})},
        "$ref": "#/$defs/tree",
    },
    {
        "$defs": {
            "node": record(name=text(maxLength=5), children=some({"$ref": "#/$defs/node"}, 0, 1))
        },
        "$ref": "#/$defs/node",
    },
    {
        "$defs": {"a": record(b=either({"$ref": "#/$defs/b"}, NOTHING)), "b": record(i=integer())},
        "$ref": "#/$defs/a",
    },
    {
        "$defs": {"money": record(amount=number(minimum=0), currency=text(pattern="^[A-Z]{3}$"))},
        **record(total={"$ref": "#/$defs/money"}, tax={"$ref": "#/$defs/money"}),
    },
    record(first=POINT, second={"$ref": "#/properties/first"}),
    {
        "$defs": {"id": {"type": "string", "format": "uuid"}},
        **record(id={"$ref": "#/$defs/id"}, parents=some({"$ref": "#/$defs/id"}, 0, 1)),
    },
]

PYDANTIC: list[Schema] = [
    {"title": "Step", **record(explanation=text(), output=text())},
    {
        "title": "Reasoning",
        "$defs": {"Step": {"title": "Step", **record(explanation=text(), output=text())}},
        **record(steps=some({"$ref": "#/$defs/Step"}, 1, 2), final_answer=text()),
    },
    {
        "title": "Person",
        "description": "Somebody",
        **record(
            ["name"],
            name={"title": "Name", "type": "string", "maxLength": 12, "description": "all of it"},
            age={"anyOf": [integer(minimum=0), NOTHING], "default": None, "title": "Age"},
        ),
    },
    {
        "title": "Order",
        "$defs": {"Size": {"enum": ["S", "M", "L"], "title": "Size", "type": "string"}},
        **record(size={"$ref": "#/$defs/Size"}, gift={"type": "boolean", "default": False}),
    },
    {
        "title": "Calendar",
        **record(
            name=text(),
            date={"type": "string", "format": "date"},
            participants=some(text(maxLength=10), 1, 3),
        ),
    },
    {
        "title": "Answer",
        **record(
            confidence=number(minimum=0, maximum=1),
            answer=text(),
            sources=some(record(page=integer(minimum=1), quote=text()), 0, 2),
        ),
    },
    {
        "title": "Sentiment",
        **record(
            label={"enum": ["positive", "neutral", "negative"], "type": "string"},
            score=number(exclusiveMinimum=0, exclusiveMaximum=1),
        ),
    },
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:example:thing",
        "examples": [{"a": 1}],
        **record(a=integer()),
    },
]

KEPT: list[Schema] = [*SCALARS, *ARRAYS, *OBJECTS, *UNIONS, *REFERENCES, *PYDANTIC]

UNKEEPABLE: list[Schema] = [
    {"not": {"type": "string"}},
    {"type": "array", "items": integer(), "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}},
    {"if": {"type": "integer"}, "then": {"minimum": 3}, "else": {"maxLength": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "minProperties": 2},
    {"type": "string", "format": "no-such-format"},
    {"type": "string", "pattern": "^(?=a)[a-z]+$"},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "#/$defs/missing"},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"type": "no-such-type"},
    {"type": "integer", "minimum": 5, "maximum": 3},
    False,  # type: ignore[list-item]
]
"""What must be refused, since it would not be kept."""
