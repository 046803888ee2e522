"""A conversation with a model of a server: messages, settings, and answers piece by piece."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_server.cli.remote import Remote


@dataclass(frozen=True)
class Piece:
    kind: Literal["thinking", "text"]
    text: str


@dataclass
class Answer:
    """In seconds since the question; `thought` is how long the model thought aloud."""

    text: str = ""
    first: float | None = None
    thought: float | None = None
    total: float = 0.0
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish: str | None = None

    @property
    def summary(self) -> str:
        """Such as `152 tokens, 41.3 tokens/s, first after 0.21 s`."""
        parts = []
        if self.tokens is not None and self.first is not None:
            seconds = self.total - self.first
            parts.append(f"{self.tokens} tokens")
            if self.tokens > 1 and seconds > 0:
                parts.append(f"{(self.tokens - 1) / seconds:.1f} tokens/s")
        if self.first is not None:
            parts.append(f"first after {self.first:.2f} s")
        if self.finish not in (None, "stop"):
            parts.append(f"ended by {self.finish}")
        return ", ".join(parts)


@dataclass
class Conversation:
    remote: Remote
    model: str
    system: str | None = None
    schema: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, answer: Answer) -> Generator[Piece, None, None]:
        """Fills `answer` as its pieces come, and keeps both sides, even of an answer that is left
        early. Raises Unavailable, and forgets the question then if nothing came.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            with closing(self.remote.stream("/v1/chat/completions", self._body())) as events:
                yield from _pieces(events, answer)
        finally:
            if answer.text:
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()

    def take_back(self) -> str | None:
        """The last question, which is forgotten with its answer."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            "model": self.model,
            "messages": [*system, *self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.sampling,
        }
        if self.schema is not None:
            schema = {"name": "answer", "schema": self.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def _pieces(events: Iterator[dict[str, Any]], answer: Answer) -> Iterator[Piece]:
    begun = time.perf_counter()
    for event in events:
        now = time.perf_counter() - begun
        answer.total = now
        if usage := event.get("usage"):
            answer.tokens = usage["completion_tokens"]
            answer.prompt_tokens = usage["prompt_tokens"]
        for choice in event.get("choices", ()):
            answer.finish = choice.get("finish_reason") or answer.finish
            delta = choice.get("delta") or {}
            thinking = delta.get("reasoning_content") or delta.get("reasoning")
            text = delta.get("content")
            if (thinking or text) and answer.first is None:
                answer.first = now
            if thinking:
                answer.thought = now
                yield Piece("thinking", thinking)
            if text:
                answer.text += text
                yield Piece("text", text)
