"""OpenAI's wire formats: shapes and bounds of what is accepted."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.chat import TOLERATED, UNSUPPORTED, ChatCompletionRequest
from mlx_server.schemas.openai.completions import CompletionRequest
from mlx_server.schemas.openai.embeddings import EmbeddingRequest
from mlx_server.schemas.openai.tokens import DetokenizeRequest, TokenizeRequest
from mlx_server.schemas.openai.tools import MAX_TOOLS
from mlx_server.schemas.sizes import MAX_CHARACTERS, MAX_DEPTH, MAX_KEYS, MAX_VALUES
from tests.support.openai import HELLO, chat_request, completion_request, named, translated


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        chat_request(temperature=value)


@pytest.mark.parametrize(
    "keep_alive", ["", "soon", "-5m", "5 weeks", "1e3", "inf", "٣m", "9" * 400, 10**400, True, [5]]
)
def test_a_keep_alive_that_is_no_duration_is_refused(keep_alive: object) -> None:
    with pytest.raises(ValidationError):
        chat_request(keep_alive=keep_alive)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat_request(**{name: {"some": "thing"}})
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none", "parallel_tool_calls": False},
        {"functions": [], "function_call": "auto"},
        {"response_format": {"type": "text"}, "grammar": ""},
        {"modalities": ["text"]},
        {"audio": None, "functions": None},
        dict.fromkeys(TOLERATED, "anything"),
        {name: {"any": ["thing"]} for name in TOLERATED},
    ],
    ids=str,
)
def test_fields_that_ask_for_nothing_change_nothing(fields: dict[str, Any]) -> None:
    assert translated(**fields) == translated()


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(MAX_DEPTH + 1),
        {"enum": list(range(MAX_VALUES))},
        {"properties": {str(i): {} for i in range(MAX_KEYS + 1)}},
        {"const": "a" * MAX_CHARACTERS},
        {"properties": {"a" * MAX_CHARACTERS: {}}},
    ],
    ids=["deep", "long", "broad", "wordy", "of a huge name"],
)
def test_a_schema_beyond_all_measure_is_refused(schema: dict[str, Any]) -> None:
    chat_request(guided_json=nested(MAX_DEPTH))
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": schema}}}
    bodies: list[dict[str, Any]] = [
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"json_schema": schema},
        {"structured_outputs": {"json": schema}},
        {"response_format": format},
        {"tools": [tool]},
        {"functions": [tool["function"]]},
    ]
    for body in bodies:
        with pytest.raises(ValidationError):
            chat_request(**body)


def test_more_tools_than_are_allowed_are_refused() -> None:
    tools = [named(f"f{i}") for i in range(MAX_TOOLS + 1)]
    assert len(chat_request(tools=tools[:-1]).tools) == MAX_TOOLS
    with pytest.raises(ValidationError):
        chat_request(tools=tools)


def test_only_one_thing_is_tokenized() -> None:
    for fields in ({}, {"prompt": "a", "content": "a"}, {"prompt": "a", "messages": HELLO}):
        with pytest.raises(BadRequest):
            TokenizeRequest.model_validate({"model": "m"} | fields)
    assert TokenizeRequest.model_validate({"model": "m", "prompt": ""}).prompt == ""


@pytest.mark.parametrize("change", [{}, {"model": None}, {"model": ""}], ids=str)
def test_the_model_may_be_left_out(change: dict[str, Any]) -> None:
    for request in (
        ChatCompletionRequest.model_validate({"messages": HELLO} | change),
        CompletionRequest.model_validate({"prompt": "Hello"} | change),
        EmbeddingRequest.model_validate({"input": [1.0, 2]} | change),
        TokenizeRequest.model_validate({"prompt": "Hello"} | change),
        DetokenizeRequest.model_validate({"tokens": [1.0, 2]} | change),
    ):
        assert request.model == ""


@pytest.mark.parametrize("value", [1.5, True, "1"])
def test_nothing_but_whole_numbers_passes_for_an_integer(value: object) -> None:
    fields: list[dict[str, Any]] = [{name: value} for name in ("n", "seed", "top_k", "max_tokens")]
    for field in fields:
        with pytest.raises(ValidationError):
            chat_request(**field)
    for prompt in ([value], [[1, value]]):
        with pytest.raises(ValidationError):
            DetokenizeRequest.model_validate({"tokens": prompt})


def test_best_of_must_equal_n() -> None:
    assert completion_request(best_of=1, suffix="").n == 1
    assert completion_request(best_of=2, n=2).n == 2
    with pytest.raises(BadRequest, match="best_of"):
        completion_request(best_of=2)
