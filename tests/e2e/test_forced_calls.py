"""A call that must come does come, parses and validates: the demo model, which knows no tools."""

import asyncio
import json
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from tests.support.demo import MODEL

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
SEND = {
    "type": "object",
    "properties": {
        "to": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"$ref": "#/$defs/person"},
        },
        "text": {"type": "string", "maxLength": 40},
    },
    "required": ["to", "text"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {"get_weather": WEATHER, "send_message": SEND}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTIONS = ["How is the weather in Rome?", "Tell Ann that I am late.", "Hello!", "2 + 2?"]
TOGETHER = 4


def asking(number: int) -> dict[str, Any]:
    """A request; each second names the tool to call."""
    names = list(SCHEMAS)
    named = {"type": "function", "function": {"name": names[number // 2 % 2]}}
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "tools": TOOLS,
        "tool_choice": named if number % 2 else "required",
        "parallel_tool_calls": False,
        "temperature": 1,
        "seed": number,
        "max_tokens": 200,
    }


async def streamed(client: openai.AsyncOpenAI, body: dict[str, Any]) -> tuple[str, str, str | None]:
    """The name and arguments of the one call, put together from the deltas, and the reason."""
    name = arguments = ""
    reason = None
    async for chunk in await client.chat.completions.create(**body, stream=True):
        [choice] = chunk.choices
        reason = choice.finish_reason or reason
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    return name, arguments, reason


async def whole(client: openai.AsyncOpenAI, body: dict[str, Any]) -> tuple[str, str, str | None]:
    answer = await client.chat.completions.create(**body)
    [choice] = answer.choices
    assert choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    return call.function.name, call.function.arguments, choice.finish_reason


@pytest.mark.parametrize("calls", [range(1, 2), pytest.param(range(50), marks=pytest.mark.soak)])
async def test_each_forced_call_parses_and_validates_and_streams_as_it_is(
    client: openai.OpenAI, calls: range
) -> None:
    limit = asyncio.Semaphore(TOGETHER)
    async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key=client.api_key) as asker:

        async def check(number: int) -> None:
            body = asking(number)
            async with limit:
                told, told_in_parts = await asyncio.gather(
                    whole(asker, body), streamed(asker, body)
                )
            assert told == told_in_parts
            name, arguments, reason = told
            if number % 2:
                assert name == body["tool_choice"]["function"]["name"]
            Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))
            assert reason == "tool_calls"

        await asyncio.gather(*(check(number) for number in calls))
