"""What binds an answer to a form: `response_format`, and other servers' fields for the same.

Only shapes and sizes are checked here. Whether a schema can be kept is found where its grammar
is made.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import Constraint
from mlx_server.schemas.openai.common import (
    GenerationRequest,
    Lenient,
    Name,
    NonEmpty,
    Refusal,
    never,
)

MAX_VALUES = 50_000
MAX_DEPTH = 100
MAX_CHARACTERS = 262_144
"""Of what a grammar is made of: JSON values, levels of nesting, and characters of text in all."""
MAX_KEYS = 1000
"""Of one object: the cost of a grammar grows with the square of an object's properties."""
MAX_CHOICES = 10_000


def check_size(value: Any) -> Any:
    """`value` itself, if it is no larger than what a grammar may be made of."""
    level, values, characters, depth = [value], 0, 0, 0
    while level:
        depth += 1
        values += len(level)
        if depth > MAX_DEPTH:
            raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")
        if values > MAX_VALUES:
            raise ValueError(f"must hold at most {MAX_VALUES} values")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                if len(one) > MAX_KEYS:
                    raise ValueError(f"must have at most {MAX_KEYS} keys in one object")
                characters += sum(map(len, one))
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                characters += len(one)
        if characters > MAX_CHARACTERS:
            raise ValueError(f"must hold at most {MAX_CHARACTERS} characters")
        level = below
    return value


def _parsed(value: Any) -> Any:
    """The object in a text of JSON, which some clients send in its place."""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        raise ValueError("must be a JSON schema, or the text of one") from None


Schema = Annotated[dict[str, Any], AfterValidator(check_size)]
SchemaOrText = Annotated[
    dict[str, Any],
    BeforeValidator(_parsed, json_schema_input_type=dict[str, Any] | NonEmpty),
    AfterValidator(check_size),
]
Text = Annotated[NonEmpty, Field(max_length=MAX_CHARACTERS)]
Choices = Annotated[
    list[NonEmpty],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
    AfterValidator(check_size),
]


class JsonSchemaFormat(Lenient):
    """A JSON schema with a name. It is kept to whether or not it calls itself strict."""

    name: Name | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Lenient):
    """The form that an answer must have."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
            ]
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Schema | None = Field(
        None, alias="schema", description="Of a `json_object`, as llama.cpp takes it."
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a format of type 'json_schema' must have a `json_schema`")
        return self

    def constraint(self, param: str) -> Constraint | None:
        """What it asks for; None for any text."""
        if self.type == "text":
            return None
        if self.type == "json_schema" and self.json_schema is not None:
            return Constraint("json_schema", self.json_schema.schema_, param)
        if self.schema_ is not None:
            return Constraint("json_schema", self.schema_, param)
        return Constraint("json_object", None, param)


class StructuredOutputs(Lenient):
    """The form that an answer must have, as vLLM writes it: one of these."""

    unsupported: ClassVar[Mapping[str, Refusal]] = {
        "structural_tag": Refusal(never),
        "whitespace_pattern": Refusal(never),
    }

    json_: SchemaOrText | None = Field(None, alias="json")
    json_object: bool = False
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None

    def constraints(self, param: str) -> list[Constraint]:
        """Everything that it asks for."""
        asked = _given(
            [
                Constraint("json_schema", self.json_, f"{param}.json"),
                Constraint("regex", self.regex, f"{param}.regex"),
                Constraint("choice", self.choice, f"{param}.choice"),
                Constraint("grammar", self.grammar, f"{param}.grammar"),
            ]
        )
        if self.json_object:
            asked.append(Constraint("json_object", None, f"{param}.json_object"))
        return asked


class ConstrainedRequest(GenerationRequest):
    """A request whose answer can be bound to a form, by one of these fields."""

    response_format: ResponseFormat | None = Field(
        None,
        description="`text`, `json_object` or `json_schema`, which is kept to as if `strict`.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="vLLM's: one of `json`, `regex`, `choice`, `grammar` (Lark or GBNF) and "
        "`json_object`.",
    )
    guided_json: SchemaOrText | None = Field(None, description="A JSON schema, or the text of one.")
    guided_regex: Text | None = Field(
        None, description="A regular expression for the whole answer."
    )
    guided_choice: Choices | None = Field(
        None, description="Texts, one of which the answer will be."
    )
    guided_grammar: Text | None = Field(None, description="A grammar in Lark or GBNF.")
    grammar: Annotated[str, Field(max_length=MAX_CHARACTERS)] = Field(
        "", description="llama.cpp's name for `guided_grammar`."
    )
    json_schema: Schema | None = Field(None, description="llama.cpp's name for `guided_json`.")

    @model_validator(mode="after")
    def _is_bound_once(self) -> Self:
        asked = self._constraints()
        if len(asked) > 1:
            raise BadRequest(
                f"`{asked[0].param}` and `{asked[1].param}` both bind the answer: give one.",
                param=asked[1].param,
            )
        if asked and self.ignore_eos:
            raise BadRequest(
                f"`ignore_eos` would go on past the end that `{asked[0].param}` sets.",
                param="ignore_eos",
            )
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must match."""
        return next(iter(self._constraints()), None)

    def _constraints(self) -> list[Constraint]:
        asked = _given(
            [
                Constraint("json_schema", self.guided_json, "guided_json"),
                Constraint("regex", self.guided_regex, "guided_regex"),
                Constraint("choice", self.guided_choice, "guided_choice"),
                Constraint("grammar", self.guided_grammar, "guided_grammar"),
                Constraint("grammar", self.grammar or None, "grammar"),
                Constraint("json_schema", self.json_schema, "json_schema"),
            ]
        )
        if self.structured_outputs is not None:
            asked += self.structured_outputs.constraints("structured_outputs")
        if self.response_format is not None:
            bound = self.response_format.constraint("response_format")
            asked += [bound] if bound else []
        return asked


def _given(constraints: list[Constraint]) -> list[Constraint]:
    """Those that have a value."""
    return [one for one in constraints if one.value is not None]
