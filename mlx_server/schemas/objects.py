"""Base classes of all protocols' wire formats."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_server.errors import BadRequest
from mlx_server.units import DURATION, parse_seconds

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_KEEP_ALIVE = 10**9
MAX_DURATION = 32
FOR_GOOD = -1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A protocol's field that this server lacks. `harmless` (value, whole object) recognises values
    that ask for nothing.
    """

    harmless: Callable[[Any, dict[str, Any]], bool]
    hint: str = "leave it out"
    code: str = "unsupported_parameter"


def never(value: Any, body: dict[str, Any]) -> bool:
    return False


def empty(value: Any, body: dict[str, Any]) -> bool:
    return value in ("", [], {})


class RequestObject(BaseModel):
    """Strict types; unknown fields are ignored; null means the default; 3.0 is as good as 3.

    Its schema is built when it is first asked for: those of all protocols take longer than a server
    should take to start.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, defer_build=True)
    unsupported: ClassVar[Mapping[str, Refusal]] = {}
    tolerated: ClassVar[Mapping[str, str]] = {}
    """Known fields without effect, with remarks."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        for name, field in described["properties"].items():
            if name not in described.get("required", ()):
                described["properties"][name] = _or_null(field)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: whole(value) for name, value in data.items() if value is not None}
        _refuse(cls.unsupported, given)
        return given


class ResponseObject(BaseModel):
    """Sent with exactly the fields that were set."""

    model_config = ConfigDict(defer_build=True)

    def to_json(self) -> bytes:
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)


def whole(value: Any) -> Any:
    """A whole float as an integer: JSON has one kind of number, and some languages write 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    if isinstance(field.get("type"), str) and not {"const", "enum"} & field.keys():
        return {**field, "type": [field["type"], "null"]}
    null = {"type": "null"}
    if "anyOf" not in field:
        return {"anyOf": [field, null]}
    return field if null in field["anyOf"] else {**field, "anyOf": [*field["anyOf"], null]}


def _refuse(unsupported: Mapping[str, Refusal], body: dict[str, Any]) -> None:
    """Raises BadRequest."""
    for name, refusal in unsupported.items():
        if name in body and not refusal.harmless(body[name], body):
            raise BadRequest(
                f"`{name}` is not supported by this server: {refusal.hint}.",
                param=name,
                code=refusal.code,
            )


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,256}$")]
"""Of a tool. Far more than protocols allow: MCP servers and clients' prefixes make odd names."""


def _seconds(value: Any) -> Any:
    """From a number or a text such as '5m'; negative means for ever."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be a number of seconds or a text such as '5m'")
    if isinstance(value, str):
        if not re.fullmatch(DURATION, value) or len(value) > MAX_DURATION:
            raise ValueError("must be a number of seconds or a text such as '90s', '5m', '-1'")
        seconds = parse_seconds(value)
        value = FOR_GOOD if seconds is None else seconds
    if value > MAX_KEEP_ALIVE:
        raise ValueError(f"must be at most {MAX_KEEP_ALIVE} seconds; -1 means for good")
    if value == -math.inf:
        raise ValueError("must be a finite number; -1 means for good")
    return float(value) if value >= 0 else FOR_GOOD


KeepAlive = Annotated[
    float,
    BeforeValidator(
        _seconds,
        json_schema_input_type=Annotated[float, Field(le=MAX_KEEP_ALIVE)]
        | Annotated[str, StringConstraints(pattern=DURATION, max_length=MAX_DURATION)],
    ),
]
