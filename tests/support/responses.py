"""OpenAI's Responses as tests read them: the grammar of their events, and the SDK's types."""

import json
import re
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

RESPONSES = "/v1/responses"
LETTERS = {
    "response.created": "C",
    "response.in_progress": "P",
    "response.output_item.added": "A",
    "response.output_item.done": "Z",
    "response.content_part.added": "b",
    "response.content_part.done": "e",
    "response.output_text.delta": "t",
    "response.output_text.done": "T",
    "response.reasoning_text.delta": "r",
    "response.reasoning_text.done": "R",
    "response.reasoning_summary_part.added": "s",
    "response.reasoning_summary_part.done": "S",
    "response.reasoning_summary_text.delta": "u",
    "response.reasoning_summary_text.done": "U",
    "response.function_call_arguments.delta": "f",
    "response.function_call_arguments.done": "F",
    "response.custom_tool_call_input.delta": "k",
    "response.custom_tool_call_input.done": "K",
    "response.completed": "!",
    "response.incomplete": "!",
    "response.failed": "X",
}
GRAMMAR = re.compile(r"CP(A(bt*Te|br*Re|su*US|f*F|k*K)Z)*!|CP.*X")
"""Of a whole stream, further `in_progress` left out, which may come anywhere."""
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WHOLE = TypeAdapter(Response)
TEXTS = {"T": "text", "R": "text", "U": "text", "F": "arguments", "K": "input"}


def check_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Fail unless the events are a stream by the protocol; returns the response that ends it."""
    letters = [LETTERS[event["type"]] for event in events]
    shown = "".join(letters[:2] + [letter for letter in letters[2:] if letter != "P"])
    assert GRAMMAR.fullmatch(shown), shown
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[Any] = []
    text = ""
    for event, letter in zip(events, letters, strict=True):
        if letter in "bs":
            text = ""
        elif letter == "A":
            text, place = "", event["item"]["id"]
            assert event["output_index"] == len(items)
        elif letter in "trufk":
            assert event["delta"]
            text += event["delta"]
        elif letter in TEXTS:
            assert event[TEXTS[letter]] == text
        elif letter == "Z":
            assert event["item"]["id"] == place
            items.append(event["item"])
        if letter not in "CPAZ!X":
            assert (event["item_id"], event["output_index"]) == (place, len(items))
    response: dict[str, Any] = events[-1]["response"]
    if letters[-1] == "!":
        assert response["output"] == items
        for event in events:
            EVENTS.validate_python(event)
    return response


async def streamed(
    client: httpx.AsyncClient, body: dict[str, Any], into: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The response that a stream ends with; the stream is checked. Its events come to `into`."""
    events = [] if into is None else into
    async with client.stream("POST", RESPONSES, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                assert events[-1]["type"] == name
    return check_stream(events)


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(RESPONSES, json=body)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    WHOLE.validate_python(response)
    return response


async def both(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, which is the same as the streamed one but for names and times."""
    one, other = await whole(client, body), await streamed(client, body)
    assert alike(one) == alike(other)
    return one


def alike(response: dict[str, Any]) -> Any:
    """Of a response, what repeats."""
    named = {"id", "call_id", "created_at", "completed_at", "input_tokens_details"}

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if key not in named}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return bare(response)


def text_of(response: dict[str, Any]) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )
