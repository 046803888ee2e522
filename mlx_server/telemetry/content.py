"""Prompts and answers as attributes of spans, where the operator asked for them:
https://github.com/open-telemetry/semantic-conventions-genai/tree/main/docs/gen-ai
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from mlx_server.schemas.internal import (
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    ToolCallDelta,
    ToolCallStart,
)

SWITCH = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
IN_SPANS = frozenset({"true", "span_only", "span_and_event"})

Part = dict[str, Any]


def is_shown() -> bool:
    return os.environ.get(SWITCH, "").strip().lower() in IN_SPANS


def asked(request: InferenceRequest) -> dict[str, str]:
    prompt = request.prompt
    if isinstance(prompt, ChatPrompt):
        shown = {"gen_ai.input.messages": _json([_message(one) for one in prompt.messages])}
        if prompt.tools:
            definitions = [{"type": "function", **one["function"]} for one in prompt.tools]
            shown["gen_ai.tool.definitions"] = _json(definitions)
        return shown
    if isinstance(prompt, TextPrompt):
        message = {"role": "user", "parts": [_text(prompt.text)]}
        return {"gen_ai.input.messages": _json([message])}
    return {}


class Transcript:
    """Gathers what the choices of a request say."""

    def __init__(self, choices: int) -> None:
        self._parts: list[list[Part]] = [[] for _ in range(choices)]
        self._finish: dict[int, str] = {}

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case TextDelta(choice=choice, text=text):
                    self._append(choice, "text", text)
                case ReasoningDelta(choice=choice, text=text):
                    self._append(choice, "reasoning", text)
                case ToolCallStart(choice=choice, id=id_, name=name):
                    self._parts[choice].append(_call(id_, name, ""))
                case ToolCallDelta(choice=choice, arguments=arguments):
                    self._parts[choice][-1]["arguments"] += arguments
                case Finished(choice=choice, reason=reason):
                    self._finish[choice] = "tool_call" if reason == "tool_calls" else reason

    def shown(self) -> dict[str, str]:
        messages = [
            {"role": "assistant", "parts": parts, "finish_reason": self._finish.get(n, "error")}
            for n, parts in enumerate(self._parts)
        ]
        return {"gen_ai.output.messages": _json(messages)}

    def _append(self, choice: int, kind: str, text: str) -> None:
        parts = self._parts[choice]
        if not parts or parts[-1]["type"] != kind:
            parts.append({"type": kind, "content": ""})
        parts[-1]["content"] += text


def _message(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "parts": list(_parts(message))}


def _parts(message: dict[str, Any]) -> Iterator[Part]:
    if thought := message.get("reasoning_content"):
        yield {"type": "reasoning", "content": thought}
    content = message.get("content")
    if message["role"] == "tool":
        call = message.get("tool_call_id")
        yield {"type": "tool_call_response", "id": call, "response": content}
    elif content:
        yield _text(content)
    for call in message.get("tool_calls") or ():
        yield _call(call.get("id"), call["function"]["name"], call["function"]["arguments"])


def _text(text: str) -> Part:
    return {"type": "text", "content": text}


def _call(id_: str | None, name: str, arguments: Any) -> Part:
    return {"type": "tool_call", "id": id_, "name": name, "arguments": arguments}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
