"""Events of a generation as a response's output items, and what is told of them as they grow."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from mlx_server.api.openai.custom_tools import InputReader
from mlx_server.api.openai.logprobs import chat_logprobs
from mlx_server.api.openai.responses.tools import Named
from mlx_server.schemas.internal import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
)

Item = dict[str, Any]
Tell = Callable[[str, dict[str, Any]], None]
"""Takes an event's type and fields."""

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def item_id(kind: str) -> str:
    return f"{PREFIXES[kind]}_{uuid4().hex}"


@dataclass(slots=True)
class _Growing:
    """An item, and where the text goes that comes for it. `place` is the text's, for events."""

    item: Item
    index: int
    event: str
    """What its events' types begin with."""
    place: dict[str, Any]
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    reader: InputReader | None = None


class OutputWriter:
    """`named` are tools by the names that the model knows. `tell` hears each event but those of
    text that grows, which `tell_delta` hears as (type, place, text, log-probabilities).
    """

    def __init__(
        self,
        named: dict[str, Named],
        *,
        summary: bool,
        seal: Callable[[str], str] | None,
        tell: Tell,
        tell_delta: Callable[[str, dict[str, Any], str, list[Any]], None],
    ) -> None:
        """Thinking is told as a `summary` or as it is, and also sealed by `seal`."""
        self.items: list[Item] = []
        self.cut_off = False
        self._named = named
        self._summary = summary
        self._seal = seal
        self._tell = tell
        self._tell_delta = tell_delta
        self._growing: _Growing | None = None

    def feed(self, event: Event) -> None:
        match event:
            case TextDelta():
                self._to("message", self._message)
                self._grow(event.text, event.logprobs)
            case ReasoningDelta():
                self._to("reasoning", self._reasoning)
                self._grow(event.text)
            case ToolCallStart():
                self.close()
                self._call(event)
            case ToolCallDelta():
                assert self._growing is not None
                reader = self._growing.reader
                self._grow(reader.push(event.arguments) if reader else event.arguments)
            case Finished():
                self.cut_off = event.reason == "length"
                self.close()

    def close(self) -> None:
        """End the item that grows, if one does."""
        growing = self._growing
        if growing is None:
            return
        if growing.reader is not None:
            self._grow(growing.reader.finish())
        self._growing = None
        text = "".join(growing.pieces)
        match growing.item["type"]:
            case "message":
                self._end_message(growing, text)
            case "reasoning":
                self._end_reasoning(growing, text)
            case "function_call":
                growing.item["arguments"] = text
                self._tell(f"{growing.event}.done", growing.place | {"arguments": text})
            case _:
                growing.item["input"] = text
                self._tell(f"{growing.event}.done", growing.place | {"input": text})
        if "status" in growing.item:
            growing.item["status"] = "incomplete" if self.cut_off else "completed"
        done = {"output_index": growing.index, "item": growing.item}
        self._tell("response.output_item.done", done)

    def _to(self, kind: str, begin: Callable[[], None]) -> None:
        if self._growing is None or self._growing.item["type"] != kind:
            self.close()
            begin()

    def _begin(self, item: Item, event: str, **place: int) -> _Growing:
        index = len(self.items)
        self.items.append(item)
        self._tell("response.output_item.added", {"output_index": index, "item": item})
        where = {"item_id": item["id"], "output_index": index} | place
        self._growing = _Growing(item, index, event, where)
        return self._growing

    def _grow(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        growing = self._growing
        assert growing is not None
        if not text and not logprobs:
            return
        growing.pieces.append(text)
        scores = [one.model_dump() for one in chat_logprobs(logprobs).content] if logprobs else []
        growing.logprobs += scores
        self._tell_delta(f"{growing.event}.delta", growing.place, text, scores)

    # messages

    def _message(self) -> None:
        item = {"id": item_id("message"), "type": "message", "role": "assistant"}
        begun = item | {"status": "in_progress", "content": []}
        growing = self._begin(begun, "response.output_text", content_index=0)
        self._tell("response.content_part.added", growing.place | {"part": _text_part("", [])})

    def _end_message(self, growing: _Growing, text: str) -> None:
        done = growing.place | {"text": text, "logprobs": growing.logprobs}
        self._tell("response.output_text.done", done)
        part = _text_part(text, growing.logprobs)
        self._tell("response.content_part.done", growing.place | {"part": part})
        growing.item["content"] = [part]

    # thinking

    def _reasoning(self) -> None:
        item: Item = {"id": item_id("reasoning"), "type": "reasoning", "summary": []}
        if self._summary:
            growing = self._begin(item, "response.reasoning_summary_text", summary_index=0)
            part = {"type": "summary_text", "text": ""}
            self._tell("response.reasoning_summary_part.added", growing.place | {"part": part})
        else:
            begun = item | {"content": []}
            growing = self._begin(begun, "response.reasoning_text", content_index=0)
            part = {"type": "reasoning_text", "text": ""}
            self._tell("response.content_part.added", growing.place | {"part": part})

    def _end_reasoning(self, growing: _Growing, text: str) -> None:
        self._tell(f"{growing.event}.done", growing.place | {"text": text})
        if self._summary:
            part = {"type": "summary_text", "text": text}
            self._tell("response.reasoning_summary_part.done", growing.place | {"part": part})
            growing.item["summary"] = [part]
        else:
            part = {"type": "reasoning_text", "text": text}
            self._tell("response.content_part.done", growing.place | {"part": part})
            growing.item["content"] = [part]
        if self._seal is not None:
            growing.item["encrypted_content"] = self._seal(text)

    # calls

    def _call(self, event: ToolCallStart) -> None:
        tool = self._named.get(event.name) or Named(event.name)
        kind = "custom_tool_call" if tool.custom else "function_call"
        item: Item = {"id": item_id(kind), "type": kind, "call_id": event.id, "name": tool.name}
        if tool.namespace is not None:
            item["namespace"] = tool.namespace
        if tool.custom:
            growing = self._begin(item | {"input": ""}, "response.custom_tool_call_input")
            growing.reader = InputReader()
        else:
            begun = item | {"arguments": "", "status": "in_progress"}
            self._begin(begun, "response.function_call_arguments")


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
