"""What programs change in a conversation's head with every request, though it says the same: left
out, or moved behind what stays, so that the rest is found in the prefix cache.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import msgspec

from mlx_server.schemas.internal import ChatPrompt

Message = dict[str, Any]
Messages = list[Message]

BILLING = re.compile(r"\A(?:\s{0,20}x-[a-z-]{1,40}-billing-header:[^\n]*(?:\n|\Z))+", re.IGNORECASE)
"""Lines that begin a system prompt, for those who bill."""
BUDGET = re.compile(
    r"^[ \t]{0,20}<total_tokens>[^<\n]{1,80}</total_tokens>[ \t]{0,20}(?:\n|\Z)", re.MULTILINE
)
"""What is left of another service's budget."""
CLOCK = re.compile(
    r"""
    ^[ \t]{0,20}(?:[-*\#>•]{1,3}[ \t]{0,3})?[*_<]{0,3}
    (?:(?:the|it|today|now)[ \t]{1,3}(?:is[ \t]{1,3})?)?
    (?:(?:current|local|present|today's)[ \t_-]{0,3}){0,2}
    (?:now|date|time|day|timestamp|today)
    (?![^\n]{0,20}(?:zone|format|example))
    [^\n]{0,80}?(?<![\d+-])(?:[01]?\d|2[0-3]):[0-5]\d(?!\d)
    [^\n]{0,80}(?:\n|\Z)
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
"""A line of its own that tells the time of the day."""
MOVED = "<system>\n{lines}\n</system>"


def settled(prompt: ChatPrompt) -> ChatPrompt:
    """The prompt as it can be cached."""
    messages = [one for one in map(_without_notes, prompt.messages) if one is not None]
    return msgspec.structs.replace(prompt, messages=_with_clocks_last(messages or prompt.messages))


def _without_notes(message: Message) -> Message | None:
    """None for a message that is nothing else."""
    content = message.get("content")
    if message.get("role") != "system" or not isinstance(content, str):
        return message
    left = BUDGET.sub("", BILLING.sub("", content))
    if left == content:
        return message
    return {**message, "content": left} if left.strip() else None


def _with_clocks_last(messages: Messages) -> Messages:
    """Lines of the first system messages go to the end of the last message that is answered."""
    leading = list(takewhile(lambda one: one.get("role") == "system", messages))
    lines = [line.strip() for one in leading for line in CLOCK.findall(str(one.get("content")))]
    last = _last_answered(messages)
    if not lines or last is None:
        return messages
    left = [{**one, "content": CLOCK.sub("", str(one.get("content")))} for one in leading]
    kept = [one for one in left if one["content"].strip()]
    told = MOVED.format(lines="\n".join(lines))
    target = {**messages[last], "content": f"{messages[last].get('content') or ''}\n\n{told}"}
    return [*kept, *messages[len(leading) : last], target, *messages[last + 1 :]]


def _last_answered(messages: Sequence[Message]) -> int | None:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].get("role") in ("user", "tool"):
            return index
    return None
