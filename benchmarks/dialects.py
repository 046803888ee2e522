"""The protocols in which the load generator asks: path, body, and how events are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, str]
"""A chat message: `role` and `content`."""
Event = dict[str, Any]


class Tokens(NamedTuple):
    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Dialect:
    """`body` takes the messages and the most tokens; `tokens` is None for events without usage."""

    name: str
    path: str
    body: Callable[[Sequence[Message], int], dict[str, Any]]
    text: Callable[[Event], str]
    tokens: Callable[[Event], Tokens | None]
    knows_ignore_eos: bool = False


def _chat_body(messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
    return {
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _chat_text(event: Event) -> str:
    """The text that the chunk carries; the first one of OpenAI's carries only the role."""
    kinds = ("content", "reasoning_content", "reasoning")
    deltas = (choice["delta"] for choice in event["choices"])
    return "".join(next(filter(None, map(delta.get, kinds)), "") for delta in deltas)


def _chat_tokens(event: Event) -> Tokens | None:
    usage = event.get("usage")
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    cached = int(details.get("cached_tokens") or 0)
    return Tokens(int(usage["prompt_tokens"]), cached, int(usage["completion_tokens"]))


def _messages_body(messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": max_tokens, "stream": True}


def _messages_text(event: Event) -> str:
    delta = event.get("delta", {})
    return str(delta.get("text") or delta.get("thinking") or "")


def _messages_tokens(event: Event) -> Tokens | None:
    if event["type"] != "message_delta":
        return None
    usage = event["usage"]
    cached = usage["cache_read_input_tokens"]
    prompt = usage["input_tokens"] + usage["cache_creation_input_tokens"] + cached
    return Tokens(prompt, cached, usage["output_tokens"])


def _responses_body(messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
    return {"input": messages, "max_output_tokens": max_tokens, "stream": True, "store": False}


def _responses_text(event: Event) -> str:
    kinds = ("response.output_text.delta", "response.reasoning_text.delta")
    return str(event["delta"]) if event["type"] in kinds else ""


def _responses_tokens(event: Event) -> Tokens | None:
    usage = event.get("response", {}).get("usage")
    if not usage:
        return None
    cached = usage["input_tokens_details"]["cached_tokens"]
    return Tokens(usage["input_tokens"], cached, usage["output_tokens"])


CHAT = Dialect(
    "chat completions",
    "/v1/chat/completions",
    _chat_body,
    _chat_text,
    _chat_tokens,
    knows_ignore_eos=True,
)
MESSAGES = Dialect("messages", "/v1/messages", _messages_body, _messages_text, _messages_tokens)
RESPONSES = Dialect(
    "responses",
    "/v1/responses",
    _responses_body,
    _responses_text,
    _responses_tokens,
    knows_ignore_eos=True,
)
