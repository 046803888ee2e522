"""Conversations and tools for chat templates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mlx_server.api.openai.custom_tools import as_function, wrapped
from mlx_server.api.tools import call_arguments, check_names, function_tool
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import ChatPrompt, ToolUse
from mlx_server.schemas.openai.chat import NO_LIMIT, PromptOptions
from mlx_server.schemas.openai.messages import ContentPart, FunctionCall, Message, ToolCall
from mlx_server.schemas.openai.tools import (
    AllowedToolChoice,
    CustomTool,
    FunctionDefinition,
    FunctionName,
    Grammar,
    NamedCustomTool,
    NamedTool,
    Tool,
    ToolChoice,
)

OLD_CALL_ID = "call00000"
"""Legacy `functions` calls have no id."""


def chat_prompt(messages: Sequence[Message], options: PromptOptions) -> ChatPrompt:
    """A final assistant message begins the answer. Raises BadRequest."""
    last = messages[-1]
    opens = last.role == "assistant" and not _calls(last)
    if opens and not _text(last):
        messages, opens = messages[:-1] or messages, False
    return ChatPrompt(
        messages=[template_message(message) for message in messages],
        tools=[_template_tool(tool) for tool in _functions(options)] or None,
        template_kwargs=_template_kwargs(options),
        continue_final=opens,
        use=_tool_use(options),
        thinking_budget=None if options.thinking_budget == NO_LIMIT else options.thinking_budget,
    )


def _template_kwargs(options: PromptOptions) -> dict[str, Any]:
    effort, budget = options.reasoning_effort, options.thinking_budget
    variables: dict[str, Any] = {}
    if effort is not None:
        variables["reasoning_effort"] = effort
    if budget is not None and budget != NO_LIMIT:
        variables["thinking_budget"] = budget
    if effort == "none" or budget == 0:
        variables["enable_thinking"] = False
    elif effort not in (None, "minimal"):
        variables["enable_thinking"] = True
    return variables | options.chat_template_kwargs


# messages


def template_message(message: Message) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    written: dict[str, Any] = {"role": role, "content": _text(message)}
    if calls := _calls(message):
        written["tool_calls"] = calls
    if message.role == "function":
        written["tool_call_id"] = OLD_CALL_ID
    for field in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, field)
        if value is not None:
            written[field] = value
    return written


def _text(message: Message) -> str:
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_part_text(part) for part in message.content)


def _part_text(part: ContentPart) -> str:
    return (part.text if part.type == "text" else part.refusal) or ""


def _calls(message: Message) -> list[dict[str, Any]]:
    calls = [_call(_function(call), call.id) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append(_call(message.function_call, OLD_CALL_ID))
    return calls


def _function(call: ToolCall) -> FunctionCall:
    if call.custom is not None:
        return FunctionCall(name=call.custom.name, arguments=wrapped(call.custom.input))
    assert call.function is not None
    return call.function


def _call(function: FunctionCall, call_id: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": function.name, "arguments": _arguments(function.arguments)},
    }


def _arguments(given: str | dict[str, Any]) -> dict[str, Any]:
    """Templates want an object. What is none, since a model or a limit cut it off, becomes the one
    value of an object, lest the whole conversation be refused from then on.
    """
    if isinstance(given, dict):
        return call_arguments(given)
    if not given.strip():
        return {}
    try:
        value = json.loads(given)
        msgspec.msgpack.encode(value)
    except (ValueError, OverflowError, RecursionError):
        return {"arguments": given}
    return value if isinstance(value, dict) else {"arguments": given}


# tools


@dataclass(frozen=True, slots=True)
class _Function:
    function: FunctionDefinition
    grammar: Grammar | None = None
    """Of a custom tool's input."""


def has_tools(options: PromptOptions) -> bool:
    return bool(options.tools or options.functions)


def custom_names(options: PromptOptions) -> frozenset[str]:
    customs = [tool.custom.name for tool in options.tools if isinstance(tool, CustomTool)]
    return frozenset(customs)


def _functions(options: PromptOptions) -> list[_Function]:
    tools = options.tools or [Tool(function=one) for one in options.functions]
    return [
        _Function(tool.function)
        if isinstance(tool, Tool)
        else _Function(as_function(tool.custom), tool.custom.format.grammar)
        for tool in tools
    ]


def _template_tool(tool: _Function) -> dict[str, Any]:
    function = tool.function
    return function_tool(function.name, function.description, function.parameters)


def _callable_tool(tool: _Function) -> dict[str, Any]:
    function = tool.function
    grammar = {} if tool.grammar is None else {"grammar": tool.grammar.model_dump()}
    return function_tool(
        function.name,
        function.description,
        function.parameters,
        strict=function.strict,
        **grammar,
    )


def _tool_use(options: PromptOptions) -> ToolUse | None:
    tools = _functions(options)
    if not options.functions and not isinstance(options.function_call, FunctionName):
        return _chosen(tools, options.tool_choice, options.parallel_tool_calls)
    old = options.function_call
    choice: ToolChoice = NamedTool(function=old) if isinstance(old, FunctionName) else old
    return _chosen(tools, choice, parallel=False)


def _chosen(tools: Sequence[_Function], choice: ToolChoice, parallel: bool) -> ToolUse | None:
    check_names(tool.function.name for tool in tools)
    if choice == "none" or (choice == "auto" and not tools):
        return None
    if not tools:
        raise BadRequest("There are no tools to choose from.", param="tool_choice")
    if isinstance(choice, NamedTool | NamedCustomTool):
        name = choice.function.name
        named = [_callable_tool(tool) for tool in _only(tools, [name])]
        return ToolUse(named, "named", name, parallel=False)  # OpenAI: exactly one call
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        tools = _only(tools, [tool.function.name for tool in allowed.tools])
        return ToolUse([_callable_tool(tool) for tool in tools], allowed.mode, parallel=parallel)
    return ToolUse([_callable_tool(tool) for tool in tools], choice, parallel=parallel)


def _only(tools: Sequence[_Function], names: Sequence[str]) -> list[_Function]:
    """Raises BadRequest for an unknown name."""
    known = {tool.function.name for tool in tools}
    for name in names:
        if name not in known:
            raise BadRequest(f"There is no tool '{name[:64]}' to choose.", param="tool_choice")
    return [tool for tool in tools if tool.function.name in names]
