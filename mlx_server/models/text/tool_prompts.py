"""Tools, calls and results in words, for templates that do not show them."""

import json
from typing import Any

from mlx_server.models.text.styles.writing import write_calls
from mlx_server.models.text.syntax import CallStyle

INSTRUCTIONS = """\
You can call functions to help with the user's request. These are their descriptions, one JSON \
object a line:
{tools}

To call a function, answer with its name and arguments in this form:
{example}
For several calls, write several such blocks. What a function returns comes back between \
<tool_response> tags. Answer in plain text when no call is needed."""
EXAMPLE = {"name": "the function's name", "arguments": {"an argument": "its value"}}


def plain_messages(
    messages: list[dict[str, Any]], style: CallStyle | None = None
) -> list[dict[str, Any]]:
    """Calls and results as plain text. Results become the user's, joined with the next user
    message, so that roles alternate.
    """
    plain: list[list[dict[str, Any]]] = []
    roles = [None, *(message.get("role") for message in messages)]
    for message, previous_role in zip(messages, roles, strict=False):
        one = result_message(calls_message(message, style))
        if previous_role == "tool" and one.get("role") == "user":
            plain[-1].append(one)
        else:
            plain.append([one])
    return [first if not more else _joined([first, *more]) for first, *more in plain]


def calls_message(message: dict[str, Any], style: CallStyle | None = None) -> dict[str, Any]:
    """With its calls, if any, in the text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    told = {name: value for name, value in message.items() if name != "tool_calls"}
    functions = [call.get("function") or {} for call in calls]
    said = [content] if (content := message.get("content")) else []
    return {**told, "content": "\n".join([*said, write_calls(functions, style)])}


def result_message(message: dict[str, Any]) -> dict[str, Any]:
    """A tool's result as the user's words."""
    if message.get("role") != "tool":
        return message
    content = message.get("content") or ""
    return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}


def describe_tools(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    system_role: bool,
    style: CallStyle | None = None,
) -> list[dict[str, Any]]:
    """In the system message, or else in the first."""
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = INSTRUCTIONS.format(tools=lines, example=write_calls([EXAMPLE], style))
    role = "system" if system_role else "user"
    if not messages or messages[0].get("role") != role:
        return [{"role": role, "content": text}, *messages]
    content = str(messages[0].get("content") or "")
    parts = [content, text] if system_role else [text, content]
    return [{**messages[0], "content": "\n\n".join(filter(None, parts))}, *messages[1:]]


def _joined(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {**messages[0], "content": "\n".join(str(one.get("content")) for one in messages)}
