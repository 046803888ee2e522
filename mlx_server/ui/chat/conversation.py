"""A conversation as a tree of messages: editing and retrying branch it. Kept in the browser."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import field

ROOT = 0
"""The parent of first messages."""
LONGEST_TITLE = 60


class Call(msgspec.Struct):
    """A tool call; `result` is what its user gave the model as its outcome."""

    id: str
    name: str
    arguments: str = ""
    result: str | None = None


class Message(msgspec.Struct):
    """`seconds` are None until they are known."""

    id: int
    parent: int
    role: str
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    model: str = ""
    error: str = ""
    finish: str = ""
    thought_seconds: float | None = None
    first_seconds: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens_per_second: float | None = None


class Lane(msgspec.Struct):
    """One model's tree. `chosen` is the child that is shown of each message that has some."""

    model: str = ""
    messages: dict[int, Message] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)

    def path(self) -> list[Message]:
        """The branch that is shown."""
        found = []
        at = self.chosen.get(ROOT)
        while at is not None:
            found.append(self.messages[at])
            at = self.chosen.get(at)
        return found

    def add(self, parent: int, role: str, content: str = "") -> Message:
        """A message below `parent`, which is then shown."""
        message = Message(max(self.messages, default=ROOT) + 1, parent, role, content)
        self.messages[message.id] = message
        self.choose(message)
        return message

    def append(self, role: str, content: str = "") -> Message:
        path = self.path()
        return self.add(path[-1].id if path else ROOT, role, content)

    def choose(self, message: Message) -> None:
        self.chosen[message.parent] = message.id

    def siblings(self, message: Message) -> list[Message]:
        """Itself among them, in the order in which they were made."""
        return [one for one in self.messages.values() if one.parent == message.parent]


class Options(msgspec.Struct):
    """What a user may set; None and "" leave a thing to the model and the server."""

    system: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str = ""
    """One a line."""
    reasoning_effort: str = ""
    schema: str = ""
    tools: str = ""

    def body(self) -> dict[str, Any]:
        """The part of a request that they make. Raises ValueError for what is no JSON."""
        plain = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        body: dict[str, Any] = {
            name: value for name in plain if (value := getattr(self, name)) is not None
        }
        if self.max_tokens:
            body["max_completion_tokens"] = self.max_tokens
        if self.stop.strip():
            body["stop"] = [line for line in self.stop.split("\n") if line]
        if self.reasoning_effort:
            body["reasoning_effort"] = self.reasoning_effort
        if self.schema.strip():
            schema = _parsed("JSON schema", self.schema)
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        if self.tools.strip():
            body["tools"] = _parsed("tools", self.tools)
        return body


class Conversation(msgspec.Struct):
    id: str = field(default_factory=lambda: uuid4().hex)
    lanes: list[Lane] = field(default_factory=lambda: [Lane()])
    options: Options = field(default_factory=Options)

    @property
    def title(self) -> str:
        first = next((m.content for m in self.lanes[0].path() if m.role == "user"), "")
        line = " ".join(first.split())
        return line if len(line) <= LONGEST_TITLE else line[: LONGEST_TITLE - 1] + "…"

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Raises msgspec.ValidationError."""
        return msgspec.json.decode(text, type=cls)

    def to_markdown(self) -> str:
        return "\n\n".join(part for lane in self.lanes for part in _written(lane, self.options))


def request_body(lane: Lane, options: Options, parent: int) -> dict[str, Any]:
    """The request for an answer below `parent`. Raises ValueError as `Options.body`."""
    messages: list[dict[str, Any]] = []
    if options.system.strip():
        messages.append({"role": "system", "content": options.system})
    above: list[Message] = []
    while parent != ROOT:
        above.append(lane.messages[parent])
        parent = lane.messages[parent].parent
    for message in reversed(above):
        messages += _sent(message)
    return {
        "model": lane.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options.body(),
    }


def _sent(message: Message) -> Iterator[dict[str, Any]]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    yield body
    for call in message.calls:
        yield {"role": "tool", "tool_call_id": call.id, "content": call.result or ""}


def _parsed(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"The {what} of the settings is not JSON: {error}") from error


def _written(lane: Lane, options: Options) -> Iterator[str]:
    yield f"# {lane.model}"
    if options.system.strip():
        yield f"## System\n\n{options.system}"
    for message in lane.path():
        yield f"## {message.role.capitalize()}\n\n{message.content}".rstrip()
        for call in message.calls:
            yield f"```json\n{json.dumps({'name': call.name, 'arguments': call.arguments})}\n```"
