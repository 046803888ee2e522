"""Describes tools to chat templates that lack them."""

import json
from typing import Any

INSTRUCTIONS = """\
You can call functions to help with the user's request. These are their descriptions, one JSON \
object a line:
{tools}

To call a function, answer with its name and arguments as a JSON object between <tool_call> tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
For several calls, write several such blocks. What a function returns comes back between \
<tool_response> tags. Answer in plain text when no call is needed."""


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls and results as plain text. Results become the user's, joined with the next user
    message, so that roles alternate.
    """
    plain: list[dict[str, Any]] = []
    roles = [None, *(message.get("role") for message in messages)]
    for message, previous_role in zip(messages, roles, strict=False):
        one = _plain_message(message)
        if previous_role == "tool" and one.get("role") == "user":
            plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{one.get('content')}"}
        else:
            plain.append(one)
    return plain


def describe_tools(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], system_role: bool
) -> list[dict[str, Any]]:
    """In the system message, or else in the first."""
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = INSTRUCTIONS.format(tools=lines)
    role = "system" if system_role else "user"
    if not messages or messages[0].get("role") != role:
        return [{"role": role, "content": text}, *messages]
    content = str(messages[0].get("content") or "")
    parts = [content, text] if system_role else [text, content]
    return [{**messages[0], "content": "\n\n".join(filter(None, parts))}, *messages[1:]]


def arguments_text(function: dict[str, Any]) -> str:
    """As JSON; clients send a string or an object."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return arguments.strip() or "{}"
    return json.dumps(arguments or {}, ensure_ascii=False)


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    text = "\n".join([*([content] if content else []), *map(_call_text, calls)])
    return {"role": "assistant", "content": text}


def _call_text(call: dict[str, Any]) -> str:
    function = call.get("function") or {}
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments_text(function)}}}\n</tool_call>'
