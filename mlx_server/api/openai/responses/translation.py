"""A response's request as one for a chat completion."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mlx_server.api.http.validation import invalid_request
from mlx_server.api.openai.responses.thinking import Sealer
from mlx_server.api.openai.responses.tools import ToolBox, flat
from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.chat import ChatCompletionRequest
from mlx_server.schemas.openai.responses.items import PASSED_OVER, Item
from mlx_server.schemas.openai.responses.requests import InputOptions, ResponseRequest, TextOptions

SAMPLING = frozenset(
    {
        *("model", "keep_alive", "priority", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "stop"),
        *("stream", "ignore_eos"),
    }
)
CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")


def chat_request(
    body: InputOptions, items: Sequence[Item], box: ToolBox, sealer: Sealer
) -> ChatCompletionRequest:
    """`items` are all that was said, oldest first. Raises BadRequest."""
    fields: dict[str, Any] = {
        "messages": messages(body.instructions, items, sealer),
        "tools": box.tools,
        "tool_choice": box.choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort,
        "thinking_budget": body.thinking_budget,
        "response_format": _format(body.text),
        "chat_template_kwargs": _variables(body),
        **{name: getattr(body, name) for name in SAMPLING & body.model_fields_set},
    }
    if isinstance(body, ResponseRequest):
        fields["max_completion_tokens"] = body.max_output_tokens
        fields["logprobs"] = body.with_logprobs
        fields["top_logprobs"] = body.top_logprobs if body.with_logprobs else None
    if not fields["messages"]:
        raise BadRequest("There is nothing to answer: give `input`.", param="input")
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        # Only what is too much once put together: each part is checked.
        refused = invalid_request(error.errors(), fields)
        raise BadRequest(refused.message, param=(refused.param or "").partition(".")[0]) from error


def _variables(body: InputOptions) -> dict[str, Any]:
    told = {} if body.text.verbosity is None else {"verbosity": body.text.verbosity}
    return told | body.chat_template_kwargs


def _format(text: TextOptions) -> dict[str, Any] | None:
    form = text.format
    if form.type == "json_schema":
        schema = {"name": form.name, "schema": form.schema_}
        return {"type": "json_schema", "json_schema": schema}
    return {"type": form.type}


def messages(
    instructions: str | None, items: Sequence[Item], sealer: Sealer
) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    if instructions:
        told.append({"role": "system", "content": instructions})
    answer: dict[str, Any] | None = None
    """The assistant's message that thinking, text and calls add to."""
    for item in items:
        if item.type in PASSED_OVER:
            continue
        if not _is_assistants(item):
            answer = None
            told.append(_told(item))
            continue
        # A message begins with its thinking, or with its text unless that comes before all calls.
        said = answer is not None and "content" in answer
        begins = item.type == "reasoning" or (item.type == "message" and said)
        if answer is None or (begins and answer.keys() - {"role", "reasoning_content"}):
            answer = {"role": "assistant"}
            told.append(answer)
        _add(answer, item, sealer)
    # Thinking of which nothing is left is no message.
    return [one for one in told if len(one) > 1]


def _is_assistants(item: Item) -> bool:
    return item.type == "reasoning" or item.type in CALLS or item.role == "assistant"


def _told(item: Item) -> dict[str, Any]:
    if item.type in OUTPUTS:
        content = "\n".join(item.texts("output"))
        return {"role": "tool", "tool_call_id": item.call_id, "content": content}
    return {"role": item.role, "content": "\n".join(item.texts("content"))}


def _add(answer: dict[str, Any], item: Item, sealer: Sealer) -> None:
    match item.type:
        case "reasoning":
            thought = _thought(item, sealer)
            if thought:
                before = answer.get("reasoning_content")
                answer["reasoning_content"] = f"{before}\n{thought}" if before else thought
        case "message":
            answer["content"] = "".join(item.texts("content"))
        case _:
            answer.setdefault("tool_calls", []).append(_call(item))


def _thought(item: Item, sealer: Sealer) -> str:
    if item.content:
        return "".join(item.texts("content"))
    opened = sealer.opened(item.encrypted_content) if item.encrypted_content else None
    return opened if opened is not None else "\n".join(item.texts("summary"))


def _call(item: Item) -> dict[str, Any]:
    name = flat(item.name or "", item.namespace)
    if item.type == "custom_tool_call":
        custom: Mapping[str, Any] = {"name": name, "input": item.input}
        return {"id": item.call_id, "type": "custom", "custom": custom}
    function = {"name": name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}
