"""Answers, whole and as lines."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlx_server.api.http.wire import StreamEvent
from mlx_server.schemas.internal import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.schemas.internal import TokenLogprob as Entry
from mlx_server.schemas.ollama.common import (
    AnswerMessage,
    AnswerPart,
    CallMade,
    ChatResponse,
    GenerateResponse,
    Logprob,
    MadeFunction,
    TokenLogprob,
)

LOWEST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON lacks."""


@dataclass(slots=True)
class Part:
    text: str = ""
    thinking: str = ""
    calls: list[CallMade] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)


Write = Callable[[str, Part, bool], AnswerPart]
"""From the model's name, what it said, and whether that is the end."""


def chat_response(model: str, part: Part, done: bool) -> ChatResponse:
    message = AnswerMessage(role="assistant", content=part.text)
    if part.thinking:
        message.thinking = part.thinking
    if part.calls:
        message.tool_calls = part.calls
    return ChatResponse(model=model, created_at=now(), message=message, done=done)


def generate_response(model: str, part: Part, done: bool) -> GenerateResponse:
    response = GenerateResponse(model=model, created_at=now(), response=part.text, done=done)
    if part.thinking:
        response.thinking = part.thinking
    return response


def bare(model: str, write: Write, reason: str) -> bytes:
    """Of a model that was loaded or unloaded and said nothing."""
    response = write(model, Part(), True)
    response.done_reason = reason
    return response.to_json()


@dataclass(slots=True)
class Answer:
    """`with_logprobs`: asked for, though there may be none."""

    model: str
    write: Write
    with_logprobs: bool
    _calls: "Calls" = field(default_factory=lambda: Calls())
    _said: list[Part] = field(default_factory=list)
    _finished: Finished | None = None

    def feed(self, prompt: int, event: Event) -> None:
        self._said += self.parts(event)

    def body(self, usage: Usage) -> bytes:
        said = self._said
        whole = Part(
            text="".join(part.text for part in said),
            thinking="".join(part.thinking for part in said),
            calls=[call for part in said for call in part.calls],
            logprobs=[entry for part in said for entry in part.logprobs],
        )
        return self.end(whole, usage)

    def parts(self, event: Event) -> list[Part]:
        match event:
            case TextDelta():
                return [Part(text=event.text, logprobs=list(event.logprobs))]
            case ReasoningDelta():
                return [Part(thinking=event.text)]
            case ToolCallStart():
                return self._calls.begin(event)
            case ToolCallDelta():
                self._calls.add(event)
            case Finished():
                self._finished = event
                return self._calls.finish()
        return []

    def written(self, part: Part, done: bool = False) -> AnswerPart:
        response = self.write(self.model, part, done)
        if self.with_logprobs and part.logprobs:
            response.logprobs = [_logprob(entry) for entry in part.logprobs]
        return response

    def end(self, part: Part, usage: Usage) -> bytes:
        assert self._finished is not None
        response = self.written(part, done=True)
        response.done_reason = "length" if self._finished.reason == "length" else "stop"
        response.prompt_eval_count = usage.prompt_tokens
        response.eval_count = usage.completion_tokens
        if (timing := self._finished.timing) is not None:
            response.total_duration = nanoseconds(timing.total)
            response.load_duration = nanoseconds(timing.load)
            response.prompt_eval_duration = nanoseconds(timing.prefill)
            response.eval_duration = nanoseconds(timing.decode)
        return response.to_json()


@dataclass(slots=True)
class Stream:
    answer: Answer

    def begin(self) -> Sequence[StreamEvent]:
        return ()

    def feed(self, prompt: int, event: Event) -> Sequence[StreamEvent]:
        return [self._event(part) for part in self.answer.parts(event)]

    def idle(self) -> StreamEvent:
        return self._event(Part())

    def end(self, usage: Usage) -> Sequence[StreamEvent]:
        return [StreamEvent(self.answer.end(Part(), usage))]

    def _event(self, part: Part) -> StreamEvent:
        return StreamEvent(self.answer.written(part).to_json())


class Calls:
    """Collects calls, which are told whole. One that was cut off is none."""

    def __init__(self) -> None:
        self._start: ToolCallStart | None = None
        self._arguments: list[str] = []

    def begin(self, event: ToolCallStart) -> list[Part]:
        made = self.finish()
        self._start = event
        return made

    def add(self, event: ToolCallDelta) -> None:
        self._arguments.append(event.arguments)

    def finish(self) -> list[Part]:
        start, self._start = self._start, None
        arguments = _object("".join(self._arguments))
        self._arguments.clear()
        if start is None or arguments is None:
            return []
        function = MadeFunction(index=start.call, name=start.name, arguments=arguments)
        return [Part(calls=[CallMade(id=start.id, function=function)])]


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _logprob(entry: Entry) -> Logprob:
    top = [_token(other.token, other.logprob, other.bytes) for other in entry.top]
    one = _token(entry.token, entry.logprob, entry.bytes)
    return Logprob(token=one.token, logprob=one.logprob, bytes=one.bytes, top_logprobs=top)


def _token(token: str, logprob: float | None, data: bytes) -> TokenLogprob:
    known = logprob is not None and not math.isnan(logprob)
    least = max(logprob, LOWEST_LOGPROB) if known and logprob is not None else LOWEST_LOGPROB
    return TokenLogprob(token=token, logprob=least, bytes=list(data))


def now() -> str:
    return moment(datetime.now(UTC))


def moment(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
