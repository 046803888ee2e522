"""What users of the Anthropic SDK rely on: messages, streams, tools, counting, errors."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic import Anthropic, beta_tool
from anthropic.types import Message
from pydantic import BaseModel, Field

from tests.sdk.conftest import CONTEXT, MODEL
from tests.support.sdk import API_KEY
from tests.support.server import Server

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]
ROME: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def claude(sdk_server: Server) -> Iterator[Anthropic]:
    """The official SDK, as a user sets it up."""
    with Anthropic(
        base_url=sdk_server.url,
        api_key=API_KEY,
        max_retries=0,
        timeout=60,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as sdk:
        yield sdk


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# messages and streams


def test_a_message_is_answered_and_what_is_said_can_be_sent_back(claude: Anthropic) -> None:
    first = claude.messages.create(model=MODEL, max_tokens=8, messages=PARIS, system="Be brief.")
    assert (first.role, first.model, first.stop_reason) == ("assistant", MODEL, "max_tokens")
    assert first.usage.output_tokens == 8
    conversation: Any = [*PARIS, {"role": "assistant", "content": first.content}, *PARIS]
    second = claude.messages.create(model=MODEL, max_tokens=8, messages=conversation)
    assert second.usage.output_tokens == 8


def test_a_stream_folds_to_the_whole_answer(claude: Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "messages": PARIS}
    whole = claude.messages.create(**asked, extra_body=GREEDY)
    with claude.messages.stream(**asked, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(whole) == text_of(final)
    assert final.usage.output_tokens == whole.usage.output_tokens == 16
    raw = list(claude.messages.create(**asked, stream=True, extra_body=GREEDY))
    assert raw[0].type == "message_start"
    assert raw[-1].type == "message_stop"


def test_a_stop_sequence_ends_the_answer_and_is_named(claude: Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": PARIS, "extra_body": GREEDY}
    said = text_of(claude.messages.create(**asked, max_tokens=16))
    stop = said[5:8]
    message = claude.messages.create(**asked, max_tokens=16, stop_sequences=["no such", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == said[: said.index(stop)]


def test_an_answer_can_be_begun_for_the_model(claude: Anthropic) -> None:
    begun: Any = [*PARIS, {"role": "assistant", "content": "It is"}]
    count = claude.messages.count_tokens
    assert count(model=MODEL, messages=begun).input_tokens > 0
    answer = claude.messages.create(model=MODEL, max_tokens=4, messages=begun, extra_body=GREEDY)
    assert text_of(answer)


def test_beta_messages_with_any_beta_are_answered(claude: Anthropic) -> None:
    message = claude.beta.messages.create(
        model=MODEL,
        max_tokens=4,
        messages=PARIS,
        betas=["context-management-2025-06-27", "not-yet-known-2030-01-01"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "adaptive"},
        output_config={"effort": "low"},
    )
    assert message.context_management is not None
    assert message.context_management.applied_edits == []


# counting and the cache


def test_tokens_are_counted_as_they_are_billed(claude: Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": PARIS,
        "system": "Be brief.",
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
    }
    counted = claude.messages.count_tokens(**asked).input_tokens
    usage = claude.messages.create(**asked, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert claude.beta.messages.count_tokens(**asked).input_tokens == counted


def test_a_prompt_that_fills_the_cache_is_read_from_it(claude: Anthropic) -> None:
    long: Any = [{"role": "user", "content": "cached words " * 50}]
    marked: Any = {"type": "ephemeral"}
    filled = claude.messages.create(model=MODEL, max_tokens=0, messages=long, cache_control=marked)
    assert (filled.content, filled.usage.output_tokens) == ([], 0)
    assert (filled.usage.cache_creation_input_tokens or 0) > 50
    read = claude.messages.create(model=MODEL, max_tokens=1, messages=long, cache_control=marked)
    assert (read.usage.cache_read_input_tokens or 0) > 50
    assert (read.usage.cache_creation_input_tokens or 0) < 32


# structured output and tools


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


class City(BaseModel):
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)
    mayor: Person | None


class Verdict(BaseModel):
    """Without bounds, which the SDK would put into descriptions."""

    guilty: bool
    court: Literal["high", "low"]


def test_parse_gives_back_the_pydantic_model(claude: Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "messages": PARIS}
    message = claude.messages.parse(**asked, output_format=Verdict)
    assert isinstance(message.parsed_output, Verdict)
    with claude.messages.stream(**asked, output_format=Verdict) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Verdict)


def test_an_answer_keeps_to_a_schema(claude: Anthropic) -> None:
    form: Any = {"type": "json_schema", "schema": City.model_json_schema()}
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "messages": PARIS}
    message = claude.messages.create(**asked, output_config={"format": form}, extra_body=GREEDY)
    assert message.stop_reason == "end_turn"
    City.model_validate_json(text_of(message))


WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=str)
def test_a_tool_call_makes_the_round_trip(claude: Anthropic, choice: Any) -> None:
    asked = claude.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=ROME,
        tools=[WEATHER, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={**choice, "disable_parallel_tool_use": True},
    )
    assert asked.stop_reason == "tool_use"
    (call,) = asked.content
    assert call.type == "tool_use"
    assert call.input.keys() == {"city", "days"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
    conversation: Any = [
        *ROME,
        {"role": "assistant", "content": asked.content},
        {"role": "user", "content": [result]},
    ]
    answer = claude.messages.create(
        model=MODEL,
        max_tokens=8,
        messages=conversation,
        tools=[WEATHER],
        tool_choice={"type": "none"},
    )
    assert text_of(answer)


def test_a_streamed_tool_call_is_the_whole_one(claude: Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 200,
        "messages": ROME,
        "tools": [WEATHER],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "extra_body": GREEDY,
    }
    (whole,) = claude.messages.create(**asked).content
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        (final,) = stream.get_final_message().content
    assert whole.type == final.type == "tool_use"
    assert whole.input == final.input
    assert kinds.count("input_json") > 1


def test_the_tool_runner_runs_tools_and_sends_their_results(claude: Anthropic) -> None:
    seen: list[str] = []

    @beta_tool
    def look(place: Literal["here", "there"]) -> str:
        """Look somewhere.

        Args:
            place: where to look
        """
        seen.append(place)
        return f"Nothing at {place}."

    runner = claude.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=100,
        messages=PARIS,
        tools=[look],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
    )
    answers = list(runner)
    assert [answer.stop_reason for answer in answers] == ["tool_use", "tool_use"]
    assert len(seen) == 2


# models and errors


def test_models_are_listed_and_retrieved_in_anthropics_shape(claude: Anthropic) -> None:
    listed = {model.id: model for model in claude.models.list()}
    assert listed[MODEL].type == "model"
    assert listed[MODEL].max_input_tokens == CONTEXT
    assert claude.models.retrieve(MODEL) == listed[MODEL]
    assert claude.beta.models.retrieve(MODEL).id == MODEL


def attempts(claude: Anthropic, **fields: Any) -> list[Callable[[], Any]]:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "messages": PARIS} | fields
    return [
        lambda: claude.messages.create(**asked),
        lambda: claude.messages.create(**asked, stream=True),
    ]


def test_errors_are_the_sdks_own(claude: Anthropic) -> None:
    stranger = claude.with_options(api_key="not the key")
    long: Any = [{"role": "user", "content": "word " * CONTEXT}]
    cases: list[tuple[list[Callable[[], Any]], type[anthropic.APIStatusError], str, str]] = [
        (attempts(stranger), anthropic.AuthenticationError, "authentication_error", "key"),
        ([stranger.models.list], anthropic.AuthenticationError, "authentication_error", "key"),
        (attempts(claude, model="none"), anthropic.NotFoundError, "not_found_error", "'none'"),
        (
            [lambda: claude.models.retrieve("no/such model")],
            anthropic.NotFoundError,
            "not_found_error",
            "no/such model",
        ),
        (
            attempts(claude, messages=long),
            anthropic.BadRequestError,
            "invalid_request_error",
            f"tokens > {CONTEXT} maximum",
        ),
        (
            attempts(claude, stop_sequences="no list"),
            anthropic.BadRequestError,
            "invalid_request_error",
            "stop_sequences",
        ),
    ]
    for tries, kind, name, says in cases:
        for attempt in tries:
            with pytest.raises(kind) as raised:
                attempt()
            assert raised.value.type == name
            assert says in (raised.value.api_message or "")
            assert raised.value.request_id


def test_a_bearer_is_as_good_as_a_key(claude: Anthropic) -> None:
    bearer = claude.with_options(
        api_key=None, default_headers={"Authorization": f"Bearer {API_KEY}", "X-Api-Key": ""}
    )
    message = bearer.messages.create(model=MODEL, max_tokens=1, messages=PARIS)
    assert message.usage.output_tokens == 1
    assert message._request_id
