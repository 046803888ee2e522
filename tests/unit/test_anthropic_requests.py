"""Anthropic's requests as internal ones."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_server.api.anthropic.signatures import holding
from mlx_server.api.http.validation import invalid_request
from mlx_server.errors import BadRequest
from mlx_server.schemas.anthropic.messages import MAX_PIECES
from mlx_server.schemas.anthropic.requests import TOLERATED, UNSUPPORTED
from mlx_server.schemas.anthropic.tools import MAX_TOOLS
from mlx_server.schemas.internal import Constraint
from tests.support.anthropic import (
    CLOCK,
    HELLO,
    TOOLS,
    WEATHER,
    WEB_SEARCH,
    body_of,
    prompt_of,
    request,
    translated,
)

Blocks = list[dict[str, Any]]


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def written(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The messages as the template gets them."""
    return prompt_of(messages=list(messages), **fields).messages


# conversations


@pytest.mark.parametrize("system", ["Be kind.\nBe brief.", [text("Be kind."), text("Be brief.")]])
def test_a_system_prompt_comes_first_as_text_or_blocks(system: Any) -> None:
    assert written(*HELLO, system=system) == [
        said("system", "Be kind.\nBe brief."),
        said("user", "Hello"),
    ]


def test_system_messages_stay_where_they_are_in_the_conversation() -> None:
    late = [said("user", "a"), said("system", [text("b")]), said("user", "c")]
    assert written(*late) == [said("user", "a"), said("system", "b"), said("user", "c")]


def test_a_system_message_that_holds_for_a_turn_is_left_out_of_the_next() -> None:
    held = said("system", "Now!") | {"clear_at": "next_user_message"}
    assert written(said("user", "a"), held) == [said("user", "a"), said("system", "Now!")]
    later = [said("user", "a"), held, said("assistant", "b"), said("user", "c")]
    assert held["content"] not in [one["content"] for one in written(*later)]


def test_thinking_calls_and_results_are_the_templates() -> None:
    blocks: Blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        text("I look."),
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}},
    ]
    results: Blocks = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny"},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": [text("12"), text("noon")]},
        {"type": "tool_result", "tool_use_id": "toolu_3", "is_error": True, "content": "broken"},
        text("And then?"),
        text("Well?"),
    ]
    assert written(said("user", "Go."), said("assistant", blocks), said("user", results)) == [
        said("user", "Go."),
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Rome"}},
                },
                {
                    "id": "toolu_2",
                    "type": "function",
                    "function": {"name": "clock", "arguments": {}},
                },
            ],
        },
        said("tool", "Sunny") | {"tool_call_id": "toolu_1"},
        said("tool", "12\nnoon") | {"tool_call_id": "toolu_2"},
        said("tool", "Error: broken") | {"tool_call_id": "toolu_3"},
        said("user", "And then?\nWell?"),
    ]


def test_thinking_that_was_left_out_comes_back_with_its_signature() -> None:
    hidden: Blocks = [
        {"type": "thinking", "thinking": "", "signature": holding("Hm, größer?")},
        {"type": "redacted_thinking", "data": holding("And so.")},
        text("Yes."),
    ]
    (_, answer, _) = written(*HELLO, said("assistant", hidden), *HELLO)
    assert answer["reasoning_content"] == "Hm, größer?\nAnd so."
    foreign: Blocks = [
        {"type": "thinking", "thinking": "", "signature": "EqQBCkYIBRgC"},
        {"type": "redacted_thinking", "data": "mlx-thinking:%%%"},
        text("Yes."),
    ]
    (_, answer, _) = written(*HELLO, said("assistant", foreign), *HELLO)
    assert answer == said("assistant", "Yes.")


def test_a_call_with_a_number_out_of_range_is_told_as_text() -> None:
    call = {"type": "tool_use", "id": "a", "name": "clock", "input": {"at": 2**70}}
    (_, answer) = written(*HELLO, said("assistant", [call]))
    function = answer["tool_calls"][0]["function"]
    assert function["arguments"] == {"arguments": json.dumps(call["input"])}


def test_documents_and_search_results_are_told_in_words() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "Rain."}
    blocks: Blocks = [
        {"type": "document", "title": "Weather", "context": "of today", "source": source},
        {
            "type": "search_result",
            "source": "https://a.example",
            "title": "Rome",
            "content": [text("Sun.")],
        },
        {"type": "document", "source": {"type": "content", "content": [text("More.")]}},
    ]
    told = "Weather\nof today\nRain.\nRome (https://a.example)\nSun.\nMore."
    assert written(said("user", blocks)) == [said("user", told)]


def test_what_anthropics_servers_did_is_passed_over() -> None:
    blocks: Blocks = [
        text("I search."),
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
    ]
    assert written(*HELLO, said("assistant", blocks), *HELLO)[1] == said("assistant", "I search.")


def test_a_last_message_of_the_assistant_is_continued() -> None:
    prompt = prompt_of(messages=[*HELLO, said("assistant", [text("The answer is (")])])
    assert prompt.continue_final
    empty = prompt_of(messages=[*HELLO, said("assistant", [])])
    assert (empty.messages, empty.continue_final) == (HELLO, False)


# tools


def test_tools_are_functions_and_those_of_anthropics_servers_are_passed_over() -> None:
    bash = {"type": "bash_20250124", "name": "bash"}
    prompt = prompt_of(tools=[WEB_SEARCH, *TOOLS, bash, {"type": "mcp_toolset"}])
    assert prompt.tools is not None
    assert [tool["function"] for tool in prompt.tools] == [
        {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": WEATHER["input_schema"],
        },
        {"name": "clock", "parameters": {"type": "object", "properties": {}}},
    ]
    assert prompt.use is not None
    strict = [tool["function"]["strict"] for tool in prompt.use.tools]
    assert (strict, prompt.use.choice, prompt.use.parallel) == ([True, False], "auto", True)
    assert prompt_of(tools=[WEB_SEARCH]).use is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", None, False)),
        ({"type": "tool", "name": "clock"}, ("named", "clock", False)),
    ],
    ids=str,
)
def test_a_choice_of_tools_is_kept(choice: Any, expected: Any) -> None:
    use = prompt_of(tools=TOOLS, tool_choice=choice).use
    assert use is not None
    assert (use.choice, use.name, use.parallel) == expected
    assert prompt_of(tools=TOOLS, tool_choice={"type": "none"}).use is None


def test_deferred_tools_are_told_of_where_a_result_refers_to_them() -> None:
    search = {"name": "find_tools", "input_schema": {"type": "object"}}
    found = {"type": "tool_reference", "tool_name": "weather"}
    call = {"type": "tool_use", "id": "t1", "name": "find_tools", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [found]}
    conversation = [*HELLO, said("assistant", [call]), said("user", [result])]
    tools = [search, WEATHER | {"defer_loading": True}]
    prompt = prompt_of(tools=tools, messages=conversation)
    assert prompt.tools is not None
    assert [tool["function"]["name"] for tool in prompt.tools] == ["find_tools"]
    assert prompt.tools == prompt_of(tools=tools).tools
    told = json.loads(prompt.messages[-1]["content"])
    assert told["function"]["description"] == "Tells the weather."
    assert prompt.use is not None
    assert len(prompt.use.tools) == 2
    # Of Anthropic's own search there is none here.
    hosted = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"}
    assert len(prompt_of(tools=[*tools, hosted]).tools or ()) == 2


# the rest


@pytest.mark.parametrize(
    ("fields", "variables", "budget"),
    [
        ({}, {}, None),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            {"enable_thinking": True, "thinking_budget": 2000},
            2000,
        ),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}, None),
        (
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
            {"enable_thinking": True, "reasoning_effort": "low"},
            None,
        ),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "max"}, None),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
            {"enable_thinking": False, "reasoning_effort": "none"},
            None,
        ),
        (
            {"thinking": {"type": "between_tools"}},
            {"enable_thinking": False, "reasoning_effort": "none"},
            None,
        ),
    ],
    ids=str,
)
def test_thinking_and_effort_are_variables_of_the_template(
    fields: Any, variables: Any, budget: int | None
) -> None:
    prompt = prompt_of(**fields)
    assert (prompt.template_kwargs, prompt.thinking_budget) == (variables, budget)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORM = {"type": "json_schema", "schema": SCHEMA}


def test_a_schema_binds_an_answer_that_may_be_text() -> None:
    new, old = translated(output_config={"format": FORM}), translated(output_format=FORM)
    assert new.constraint == Constraint("json_schema", SCHEMA, "output_config.format")
    assert old.constraint == Constraint("json_schema", SCHEMA, "output_format")
    forced = translated(output_format=FORM, tools=TOOLS, tool_choice={"type": "any"})
    assert forced.constraint is None


def test_limits_stops_and_sampling_are_kept() -> None:
    asked = translated(max_tokens=7, stop_sequences=["a", "", "b"], top_k=4, temperature=0.5)
    assert (asked.max_tokens, asked.stop) == (7, ("a", "b"))
    assert (asked.sampling.temperature, asked.sampling.top_k) == (0.5, 4)
    assert asked.unasked == {"top_p", "min_p", "repetition_penalty"}
    greedy = translated(temperature=0)
    assert (greedy.sampling.temperature, greedy.sampling.top_p) == (0, 1)
    assert greedy.unasked == {"top_k", "min_p", "repetition_penalty"}


@pytest.mark.parametrize("name", [*TOLERATED, "something_new"])
def test_what_changes_nothing_here_is_taken(name: str) -> None:
    assert translated(**{name: {"a": 1}}) == translated()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_done_here_is_refused(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        request(**{name: [{"a": 1}]})
    assert refused.value.param == name
    request(**{name: None})


# refusals

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
PDF = {"type": "document", "source": {"type": "base64", "data": "", "media_type": "x"}}


@pytest.mark.parametrize(
    ("messages", "where", "says"),
    [
        ([said("user", [text("See"), IMAGE])], "messages.0.content.1", "text only"),
        ([said("user", [PDF])], "messages.0.content.0.source", "text only"),
        (
            [said("user", [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}])],
            "messages.0.content.0.content.0",
            "text only",
        ),
        ([said("robot", "a")], "messages.0", "no role 'robot'"),
        ([said("user", [{"type": "tool_use"}])], "messages.0.content.0", "no 'tool_use' here"),
        ([said("assistant", [{"type": "tool_result"}])], "messages.0.content.0", "'tool_result'"),
        ([said("user", [{"text": "a"}])], "messages.0.content.0", "type"),
        ([said("user", ["a"])], "messages.0.content.0", "dictionary"),
        ([said("assistant", [{"type": "thinking"}])], "messages.0.content.0.thinking", "required"),
    ],
    ids=str,
)
def test_a_refusal_names_the_place_and_the_reason(messages: Any, where: str, says: str) -> None:
    body = body_of(messages=messages)
    with pytest.raises(ValidationError) as raised:
        request(messages=messages)
    refused = invalid_request(raised.value.errors(), body)
    assert refused.param == where
    assert says in refused.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [said("user", [])]}, "messages"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}, "tools": [WEB_SEARCH]}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "web_search"}, "tools": [WEB_SEARCH]}, None),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(fields: Any, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        translated(**fields)
    assert refused.value.param == param or param is None


def test_too_many_pieces_and_tools_are_refused() -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": [text("a")] * (MAX_PIECES - 2)}
    request(messages=[said("user", [result])])
    for messages in (HELLO * (MAX_PIECES + 1), [said("user", [result] * 2)]):
        with pytest.raises(ValidationError, match="at most 10000 messages and blocks"):
            request(messages=messages)
    many = [CLOCK | {"name": f"clock-{number}"} for number in range(MAX_TOOLS + 1)]
    request(tools=many[1:])
    with pytest.raises(ValidationError):
        request(tools=many)
