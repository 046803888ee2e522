"""An answer's form: `response_format`, and other servers' equivalents."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from mlx_server.schemas.objects import Name, NonEmpty, Refusal, RequestObject, never
from mlx_server.schemas.openai.common import GenerationRequest
from mlx_server.schemas.sizes import MAX_CHARACTERS, Schema, check_size

MAX_CHOICES = 10_000


def _parsed(value: Any) -> Any:
    """Some clients send schemas as text."""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        raise ValueError("must be a JSON schema, or the text of one") from None


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


class JsonSchemaFormat(RequestObject):
    """Enforced whether or not it is `strict`."""

    name: Name | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool = True


class ResponseFormat(RequestObject):
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


class StructuredOutputs(RequestObject):
    """vLLM's form; one of these fields."""

    unsupported: ClassVar[Mapping[str, Refusal]] = {
        "structural_tag": Refusal(never),
        "whitespace_pattern": Refusal(never),
    }

    json_: SchemaOrText | None = Field(None, alias="json")
    json_object: bool = False
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None


class ConstrainedRequest(GenerationRequest):
    """At most one of these fields may constrain the answer."""

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
