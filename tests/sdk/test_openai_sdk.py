"""What users of the OpenAI SDK rely on: inputs, streams, errors, headers, leaving early."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, Field

from tests.sdk.conftest import MODEL
from tests.support.server import until

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]
ENDLESS: dict[str, Any] = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
CONTEXT = 8192

EngineWork = Callable[[], Awaitable[dict[str, int]]]
EngineIsFree = Callable[[], Awaitable[None]]


def code_of(error: openai.APIStatusError) -> Any:
    """The code in the error's body, which the SDK has read from under `error`."""
    assert isinstance(error.body, dict)
    assert error.code == error.body["code"]
    return error.code


# completions


async def test_choices_of_several_prompts_are_ordered_by_prompt(async_client: AsyncOpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    answer = await async_client.completions.create(
        model=MODEL, prompt=prompts, n=2, temperature=0, max_tokens=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for index, choice in enumerate(answer.choices):
        assert choice.text.startswith(prompts[index // 2])


async def test_completions_are_sixteen_tokens_long_unless_told(async_client: AsyncOpenAI) -> None:
    answer = await async_client.completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


# streams


def test_usage_comes_last_in_a_stream_when_asked_for_and_never_otherwise(client: OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": PARIS, "max_tokens": 4, "stream": True}
    told = list(client.chat.completions.create(**request, stream_options={"include_usage": True}))
    untold = list(client.chat.completions.create(**request))
    assert all(chunk.usage is None for chunk in (*told[:-1], *untold))
    assert all(chunk.choices for chunk in (*told[:-1], *untold))
    assert told[-1].choices == []
    usage = told[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 4
    assert usage.total_tokens == usage.prompt_tokens + 4


def test_a_stream_opens_with_the_role_and_repeats_its_header(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=PARIS, max_tokens=4, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


# structured output and tools


class Continent(StrEnum):
    AFRICA = "Africa"
    EUROPE = "Europe"


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


class City(BaseModel):
    """A place where people live."""

    name: str = Field(max_length=20)
    continent: Continent
    inhabitants: int = Field(ge=0, le=99_999_999)
    mayor: Person | None
    sights: list[Person] = Field(max_length=2)


class Weather(BaseModel):
    """Tells the weather of a city."""

    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)


CITY: Any = [{"role": "user", "content": "Tell me about Paris."}]
WEATHER: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
TOOL = openai.pydantic_function_tool(Weather)
TEMPERATURES = pytest.mark.parametrize("temperature", [0, 1])


@TEMPERATURES
def test_parse_gives_back_the_pydantic_model(client: OpenAI, temperature: float) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=CITY, response_format=City, temperature=temperature, max_tokens=300
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, City)
    assert City.model_validate_json(choice.message.content or "") == choice.message.parsed


@TEMPERATURES
def test_a_stream_of_a_pydantic_model_grows_into_it(client: OpenAI, temperature: float) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=CITY, response_format=City, temperature=temperature, max_tokens=300
    ) as stream:
        parsed = [event.parsed for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, City)
    assert any(isinstance(part, dict) for part in parsed)


def test_a_document_that_is_cut_short_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=MODEL, messages=CITY, response_format=City, max_tokens=3
        )


@TEMPERATURES
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Weather"}}], ids=str
)
def test_a_tool_call_makes_the_round_trip(client: OpenAI, choice: Any, temperature: float) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "temperature": temperature}
    asked = client.chat.completions.parse(
        messages=WEATHER, tool_choice=choice, parallel_tool_calls=False, max_tokens=100, **options
    ).choices[0]
    assert asked.finish_reason == "tool_calls"
    assert asked.message.content is None
    assert asked.message.tool_calls is not None
    (call,) = asked.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    # The SDK's own way to send a message back.
    conversation: Any = [*WEATHER, asked.message, result]
    answer = client.chat.completions.create(
        messages=conversation, tool_choice="none", max_tokens=8, **options
    ).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None


def test_a_streamed_tool_call_is_the_whole_one(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": WEATHER,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    whole = client.chat.completions.parse(**options).choices[0].message
    with client.chat.completions.stream(**options) as stream:
        names = [event.type for event in stream]
        final = stream.get_final_completion().choices[0].message
    assert whole.tool_calls is not None
    assert final.tool_calls is not None
    assert [call.function for call in final.tool_calls] == [
        call.function for call in whole.tool_calls
    ]
    assert final.content is None
    assert names.count("tool_calls.function.arguments.delta") > 1
    assert names.count("tool_calls.function.arguments.done") == 1


def test_old_functions_are_answered_in_their_old_form(client: OpenAI) -> None:
    message = client.chat.completions.create(
        model=MODEL,
        messages=WEATHER,
        functions=[TOOL["function"]],  # type: ignore[list-item]
        function_call={"name": "Weather"},
        max_tokens=200,
    ).choices[0]
    assert message.finish_reason == "function_call"
    assert message.message.tool_calls is None
    assert message.message.function_call is not None
    assert message.message.function_call.name == "Weather"
    Weather.model_validate_json(message.message.function_call.arguments)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["Paris", "London"]}, r"Paris|London"),
        ({"guided_regex": r"[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'root ::= "yes" | "no" [!]'}, r"yes|no!"),
        ({"structured_outputs": {"grammar": 'start: "a" /b{2}/'}}, r"abb"),
    ],
    ids=str,
)
async def test_completions_and_chats_match_what_other_servers_fields_ask_for(
    async_client: AsyncOpenAI, fields: dict[str, Any], pattern: str
) -> None:
    chat, text = await asyncio.gather(
        async_client.chat.completions.create(
            model=MODEL, messages=PARIS, max_tokens=32, extra_body=fields
        ),
        async_client.completions.create(
            model=MODEL, prompt="Paris", max_tokens=32, extra_body=fields
        ),
    )
    assert re.fullmatch(pattern, chat.choices[0].message.content or "")
    assert re.fullmatch(pattern, text.choices[0].text)
    assert chat.choices[0].finish_reason == text.choices[0].finish_reason == "stop"


async def test_json_mode_gives_an_object(async_client: AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(
        model=MODEL,
        messages=CITY,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    said, reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert said.startswith("{")
    assert reason == "length" or isinstance(json.loads(said), dict)


# models and errors


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert listed[MODEL].object == "model"
    assert client.models.retrieve(MODEL) == listed[MODEL]


def test_an_answer_names_the_model_as_the_list_does(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="One,", max_tokens=1)
    assert answer.model == MODEL


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: client.models.retrieve("no-such-model"),
        lambda: client.models.retrieve("no/such model"),
        lambda: client.chat.completions.create(model="no-such-model", messages=PARIS),
        lambda: client.chat.completions.create(model="no-such-model", messages=PARIS, stream=True),
        lambda: client.completions.create(model="no-such-model", prompt="One,"),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError) as raised:
            attempt()
        assert code_of(raised.value) == "model_not_found"
        assert "no" in raised.value.message


def test_a_wrong_key_is_an_authentication_error(client: OpenAI) -> None:
    stranger = client.with_options(api_key="not the key")
    attempts: list[Callable[[], Any]] = [
        stranger.models.list,
        lambda: stranger.chat.completions.create(model=MODEL, messages=PARIS, stream=True),
        lambda: stranger.completions.create(model=MODEL, prompt="One,"),
    ]
    for attempt in attempts:
        with pytest.raises(openai.AuthenticationError) as raised:
            attempt()
        assert code_of(raised.value) == "invalid_api_key"
        assert "not the key" not in str(raised.value)


def test_what_cannot_fit_the_context_is_refused_at_once(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * CONTEXT}]
    attempts: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model=MODEL, messages=long),
        lambda: client.chat.completions.create(model=MODEL, messages=long, stream=True),
        lambda: client.completions.create(model=MODEL, prompt=[1] * CONTEXT),
        lambda: client.completions.create(model=MODEL, prompt=["One,", "word " * CONTEXT]),
    ]
    for attempt in attempts:
        with pytest.raises(openai.BadRequestError) as raised:
            attempt()
        assert code_of(raised.value) == "context_length_exceeded"
        assert str(CONTEXT) in raised.value.message


def test_a_value_out_of_bounds_is_a_bad_request_that_names_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=PARIS, temperature=3)
    assert raised.value.param == "temperature"
    assert raised.value.type == "invalid_request_error"


def test_every_answer_has_a_request_id(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="One,", max_tokens=1)
    assert raw.headers["x-request-id"]
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    given = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=PARIS,
        max_tokens=1,
        stream=True,
        extra_headers={"x-request-id": "mine-1"},
    )
    assert given.headers["x-request-id"] == "mine-1"
    list(given.parse())
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("no-such-model")
    assert raised.value.request_id not in (None, raw.headers["x-request-id"])


# leaving early


async def test_a_cancelled_stream_frees_the_engine(
    async_client: AsyncOpenAI, engine_work: EngineWork, engine_is_free: EngineIsFree
) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        stream: AsyncIterator[ChatCompletionChunk] = await async_client.chat.completions.create(
            model=MODEL, messages=PARIS, stream=True, n=2, **ENDLESS
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                begun.set()

    reading = asyncio.create_task(read())
    try:
        await asyncio.wait_for(begun.wait(), 30)
        assert (await engine_work())["in_flight"] > 0
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    await engine_is_free()


async def test_a_stream_closed_by_leaving_its_block_frees_the_engine(
    async_client: AsyncOpenAI, engine_is_free: EngineIsFree
) -> None:
    async with await async_client.completions.create(
        model=MODEL, prompt="One, two,", stream=True, **ENDLESS
    ) as stream:
        async for chunk in stream:
            if chunk.choices[0].text:
                break
    await engine_is_free()


async def test_a_cancelled_whole_answer_frees_the_engine(
    async_client: AsyncOpenAI, engine_work: EngineWork, engine_is_free: EngineIsFree
) -> None:
    asking = asyncio.create_task(
        async_client.chat.completions.create(model=MODEL, messages=PARIS, **ENDLESS)
    )

    async def running() -> int:
        return (await engine_work())["in_flight"]

    await until(running, 30)
    asking.cancel()
    await asyncio.wait([asking])
    await engine_is_free()
