"""Anthropic's protocol as tests see it: requests in process, events on the wire, their grammar."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter
from pydantic_core import from_json

from mlx_server.api.anthropic import messages
from mlx_server.schemas.anthropic.requests import MessagesRequest
from mlx_server.schemas.internal import Caller, ChatPrompt, InferenceRequest

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
VERSION = {"anthropic-version": "2023-06-01"}
HELLO = [{"role": "user", "content": "Hello"}]
CALLER = Caller("req_1")

WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CLOCK = {"name": "clock", "input_schema": {}}
TOOLS = [WEATHER, CLOCK]
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}


def body_of(model: str = "m", /, **fields: Any) -> dict[str, Any]:
    """A request that greets."""
    return {"model": model, "max_tokens": 100, "messages": HELLO} | fields


def request(**fields: Any) -> MessagesRequest:
    return MessagesRequest.model_validate(body_of(**fields))


def translated(**fields: Any) -> InferenceRequest:
    return messages.to_inference(request(**fields), CALLER)


def prompt_of(**fields: Any) -> ChatPrompt:
    prompt = translated(**fields).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


# grammar

GRAMMAR = re.compile(
    r"""
    message_start ;
    ( text ; (text_delta ;)+ stop ;
    | thinking ; (thinking_delta ;)* signature_delta ; stop ;
    | tool_use ; (input_json_delta ;)* stop ;
    )*
    message_delta ; message_stop ;
    """,
    re.VERBOSE,
)
"""Of a stream that ends well, pings left out."""

EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


@dataclass
class Events:
    """A stream's events as they came, each valid by the SDK's own types."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    pings: int = 0
    error: dict[str, Any] | None = None

    def take(self, name: str, body: dict[str, Any]) -> None:
        assert name == body["type"]
        assert self.error is None, "something follows an error"
        if name == "ping":
            assert self.bodies, "a ping comes first"
            assert body == {"type": "ping"}
            self.pings += 1
        elif name == "error":
            ErrorResponse.model_validate(body, strict=True)
            self.error = body
        else:
            EVENT.validate_json(json.dumps(body), strict=True)
            self.bodies.append(body)

    def check(self) -> None:
        """Assert that the grammar is kept to, and that deltas and stops are of the open block."""
        assert self.error is None, self.error
        assert GRAMMAR.fullmatch("".join(f"{_word(body)};" for body in self.bodies))
        started = [one["index"] for one in self.bodies if one["type"] == "content_block_start"]
        assert started == list(range(len(started)))
        current = -1
        for body in self.bodies:
            current += body["type"] == "content_block_start"
            assert body.get("index", current) == current

    @property
    def message(self) -> Message:
        """What the events fold to."""
        self.check()
        whole = dict(self.bodies[0]["message"])
        end = self.bodies[-2]
        whole |= {"content": self._blocks()} | end["delta"]
        whole["usage"] = whole["usage"] | end["usage"]
        return Message.model_validate(whole)

    def _blocks(self) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        for body in self.bodies:
            if body["type"] == "content_block_start":
                blocks.append(dict(body["content_block"]))
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"] = ""
            elif body["type"] == "content_block_delta":
                for key, value in body["delta"].items():
                    if key != "type":
                        key = "input" if key == "partial_json" else key
                        blocks[-1][key] += value
            elif body["type"] == "content_block_stop" and blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = from_json(blocks[-1]["input"] or "{}", allow_partial=True)
        return blocks


def _word(body: dict[str, Any]) -> str:
    match body["type"]:
        case "content_block_start":
            return str(body["content_block"]["type"])
        case "content_block_delta":
            return str(body["delta"]["type"])
        case "content_block_stop":
            return "stop"
    return str(body["type"])


# over HTTP


async def read_events(
    client: httpx.AsyncClient, body: dict[str, Any], into: Events | None = None
) -> Events:
    """Read a stream to its end, well or with an error; it can be looked at in `into` meanwhile."""
    events = Events() if into is None else into
    async with client.stream("POST", MESSAGES, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for name, data in sse(response):
            events.take(name, data)
    return events


async def sse(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Names and data; comments have no place here."""
    name = ""
    async for line in response.aiter_lines():
        kind, _, rest = line.partition(": ")
        assert kind in ("event", "data", ""), line
        if kind == "event":
            name = rest
        elif kind == "data":
            yield name, json.loads(rest)


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> Message:
    """The answer to a request that does not stream, valid by the SDK's own type."""
    answer = await client.post(MESSAGES, json=body)
    assert answer.status_code == 200, answer.text
    return Message.model_validate_json(answer.content, strict=True)


async def both(client: httpx.AsyncClient, body: dict[str, Any]) -> Message:
    """The answer, which is the same streamed and whole but for ids and what the cache had."""
    streamed = (await read_events(client, body)).message
    at_once = await whole(client, body)
    assert alike(streamed) == alike(at_once)
    return at_once


def alike(message: Message) -> dict[str, Any]:
    """Of a message, what repeats."""
    told = message.model_dump(exclude={"id": True, "usage": True})
    for block in told["content"]:
        if block["type"] == "tool_use":
            block.pop("id")
    return told | {"output": message.usage.output_tokens, "prompt": prompt_tokens(message)}


def prompt_tokens(message: Message) -> int:
    usage = message.usage
    created, read = usage.cache_creation_input_tokens, usage.cache_read_input_tokens
    return usage.input_tokens + (created or 0) + (read or 0)


def assert_refused(answer: httpx.Response, status: int, kind: str = "") -> str:
    """Assert that the answer is an error in Anthropic's shape; returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    body = answer.json()
    ErrorResponse.model_validate(
        {**body, "error": {**body["error"], "type": _known(body["error"]["type"])}}, strict=True
    )
    assert body["request_id"] == answer.headers["request-id"]
    assert not kind or body["error"]["type"] == kind
    message: str = body["error"]["message"]
    assert message
    return message


def _known(kind: str) -> str:
    """The SDK has no class for bodies that are too large."""
    return "invalid_request_error" if kind == "request_too_large" else kind


def texts(message: Message) -> Sequence[str]:
    return [block.text for block in message.content if block.type == "text"]
