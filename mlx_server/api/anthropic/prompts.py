"""Conversations for chat templates."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mlx_server.api.anthropic.choices import tool_use
from mlx_server.api.anthropic.signatures import held
from mlx_server.api.anthropic.texts import Definition, joined, plain, text_of
from mlx_server.api.tools import call_arguments, check_names, function_tool
from mlx_server.errors import BadRequest
from mlx_server.schemas.anthropic.blocks import (
    AssistantBlock,
    RedactedThinkingBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserBlock,
)
from mlx_server.schemas.anthropic.messages import (
    AssistantTurn,
    Message,
    SystemTurn,
    UserTurn,
)
from mlx_server.schemas.anthropic.requests import CountTokensRequest, ThinkingConfig
from mlx_server.schemas.anthropic.tools import CustomTool, HostedTool
from mlx_server.schemas.internal import ChatPrompt

Written = dict[str, Any]

FAILED = "Error: "


def chat_prompt(body: CountTokensRequest) -> ChatPrompt:
    """A final assistant message begins the answer. Raises BadRequest."""
    tools = [tool for tool in body.tools if isinstance(tool, CustomTool)]
    check_names(tool.name for tool in tools)
    deferred = _deferred(body, tools)
    messages = list(_messages(body, deferred))
    if not messages:
        raise BadRequest("The messages hold nothing.", param="messages")
    opens = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    if opens and not messages[-1]["content"]:
        messages, opens = messages[:-1] or messages, False
    return ChatPrompt(
        messages=messages,
        tools=[_shown(tool) for tool in tools if tool.name not in deferred] or None,
        template_kwargs=_template_kwargs(body),
        continue_final=opens,
        use=tool_use(tools, body.tool_choice),
        thinking_budget=_budget(body.thinking),
    )


# messages


def _messages(body: CountTokensRequest, deferred: Mapping[str, CustomTool]) -> Iterator[Written]:
    def definition(name: str) -> Written | None:
        return _shown(deferred[name]) if name in deferred else None

    if system := plain(body.system):
        yield _said("system", system)
    spoken = [index for index, one in enumerate(body.messages) if one.role == "user"]
    for index, message in enumerate(body.messages):
        if not _is_cleared(message, index, spoken):
            yield from _written(message, definition)


def _is_cleared(message: Message, index: int, spoken: Sequence[int]) -> bool:
    if not isinstance(message, SystemTurn) or message.clear_at == "never":
        return False
    return bool(spoken) and spoken[-1] > index


def _written(message: Message, definition: Definition) -> Iterator[Written]:
    match message:
        case UserTurn(content=str(text)) | AssistantTurn(content=str(text)):
            yield _said(message.role, text)
        case UserTurn():
            yield from _user(message.content, definition)
        case AssistantTurn():
            yield _assistant(message.content)
        case SystemTurn():
            if text := plain(message.content):
                yield _said("system", text)


def _user(content: Sequence[UserBlock] | str, definition: Definition) -> Iterator[Written]:
    """Results and what is said between them, in their order."""
    for is_result, blocks in groupby(content, lambda one: isinstance(one, ToolResultBlock)):
        if is_result:
            for block in blocks:
                assert isinstance(block, ToolResultBlock)
                yield _result(block, definition)
        else:
            texts = [text for block in blocks if (text := text_of(block)) is not None]
            if texts:
                yield _said("user", joined(texts))


def _result(block: ToolResultBlock, definition: Definition) -> Written:
    text = plain(block.content, definition)
    said = f"{FAILED}{text}" if block.is_error else text
    return _said("tool", said, tool_call_id=block.tool_use_id)


def _assistant(content: Sequence[AssistantBlock] | str) -> Written:
    texts, thoughts, calls = list[str](), list[str](), list[Written]()
    for block in content:
        match block:
            case ThinkingBlock():
                thoughts.append(block.thinking or held(block.signature))
            case RedactedThinkingBlock():
                thoughts.append(held(block.data))
            case ToolUseBlock():
                calls.append(_call(block))
            case _ if (text := text_of(block)) is not None:
                texts.append(text)
    written = _said("assistant", joined(texts))
    if thinking := joined(filter(None, thoughts)):
        written["reasoning_content"] = thinking
    if calls:
        written["tool_calls"] = calls
    return written


def _call(block: ToolUseBlock) -> Written:
    function = {"name": block.name, "arguments": call_arguments(block.input)}
    return {"id": block.id, "type": "function", "function": function}


def _said(role: str, text: str, **more: str) -> Written:
    return {"role": role, "content": text, **more}


# tools and thinking


def _deferred(body: CountTokensRequest, tools: Sequence[CustomTool]) -> dict[str, CustomTool]:
    """Tools that the client's own search will find. They are told of where a result refers to
    them, so that the prompt begins as before. Of Anthropic's search there is none here, and without
    one all are shown.
    """
    searched = any(isinstance(t, HostedTool) and "tool_search" in t.type for t in body.tools)
    deferred = {tool.name: tool for tool in tools if tool.defer_loading}
    return {} if searched or len(deferred) == len(tools) else deferred


def _shown(tool: CustomTool) -> Written:
    return function_tool(tool.name, tool.description, tool.input_schema)


def _template_kwargs(body: CountTokensRequest) -> Written:
    effort, budget = body.output_config.effort, _budget(body.thinking)
    variables: Written = {}
    if effort is not None:
        variables["reasoning_effort"] = effort
    if body.thinking is not None:
        variables["enable_thinking"] = body.thinking.wanted
        if not body.thinking.wanted:
            variables["reasoning_effort"] = "none"
    if budget is not None:
        variables["thinking_budget"] = budget
    return variables


def _budget(thinking: ThinkingConfig | None) -> int | None:
    return thinking.budget_tokens if thinking is not None and thinking.wanted else None
