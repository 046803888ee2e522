"""What Pydantic finds wrong becomes one error that names the field."""

from typing import Any

import pytest
from pydantic import ValidationError

from mlx_server.api.http.validation import invalid_request
from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.chat import ChatCompletionRequest
from tests.support.openai import chat_body


def refusal(**fields: Any) -> BadRequest:
    body = chat_body(**fields)
    with pytest.raises(ValidationError) as invalid:
        ChatCompletionRequest.model_validate(body)
    return invalid_request(invalid.value.errors(), body)


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "custom", "custom": {"name": ""}},
        {"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}},
        {"type": "custom"},
        {"type": "web_search"},
        {"type": "function"},
        {"type": "function", "function": {"name": ""}},
        {"type": "function", "function": {"name": "a" * 257}},
        {"type": "function", "function": {"name": "f\n"}},
        {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}},
        {"type": "function", "function": {"name": "f", "parameters": []}},
        {"type": "function", "function": {"name": "f", "strict": "yes"}},
    ],
    ids=str,
)
def test_a_tool_that_is_neither_function_nor_custom_tool_is_refused(tool: dict[str, Any]) -> None:
    assert (refusal(tools=[tool]).param or "").startswith("tools.0")


def test_a_hosted_tool_is_refused_in_plain_words() -> None:
    message = refusal(tools=[{"type": "web_search"}]).message
    assert "'web_search' are not supported" in message


def test_the_branch_of_a_union_that_was_meant_is_named() -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    assert error.param == "messages.0.content.0"
    assert "text only" in error.message


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    assert "secret" not in refusal(temperature="secret " * 1000).message
