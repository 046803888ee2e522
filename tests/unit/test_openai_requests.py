"""OpenAI's requests, translated to the internal ones."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_server.api.openai import chat
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import ChatPrompt, Constraint, TextPrompt, TokenPrompt, ToolUse
from tests.support.openai import (
    CALLER,
    CLOCK,
    HELLO,
    TOOLS,
    WEATHER,
    chat_prompt,
    chat_request,
    completions_translated,
    named,
    translated,
)

# parameters


@pytest.mark.parametrize(
    ("fields", "name", "wanted"),
    [
        ({}, "n", 1),
        ({}, "seed", None),
        ({}, "max_tokens", None),
        ({}, "stop", ()),
        ({}, "logprobs", None),
        ({}, "priority", 0),
        ({"priority": -3}, "priority", -3),
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, "max_tokens", 7),
        ({"stop": "end"}, "stop", ("end",)),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": []}, "stop", ()),
        ({"stop": ""}, "stop", ()),
        ({"stop": ["a", ""]}, "stop", ("a",)),
        ({"stop": list("abcdefghijklmnopqrst")}, "stop", tuple("abcdefghijklmnopqrst")),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"max_tokens": 2**53 - 1}, "max_tokens", 2**53 - 1),
        ({"max_tokens": 5, "max_completion_tokens": 0}, "max_tokens", 5),
        ({"max_tokens": 5, "max_completion_tokens": -1}, "max_tokens", None),
        ({"max_completion_tokens": 7.0}, "max_tokens", 7),
        ({"n": 2.0}, "n", 2),
        ({"logprobs": True, "top_logprobs": 2.0}, "logprobs", 2),
        ({"seed": -(2**63)}, "seed", -(2**63)),
        ({"seed": -1}, "seed", None),
        ({"seed": -2}, "seed", -2),
        ({"seed": 42.0}, "seed", 42),
        ({"seed": 0}, "seed", 0),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 4}, "logprobs", 4),
    ],
    ids=str,
)
def test_a_parameter_of_chat_completions_means(
    fields: dict[str, Any], name: str, wanted: object
) -> None:
    assert getattr(translated(**fields), name) == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 40.0, "temperature": 1}, {"top_k": 40, "temperature": 1.0}),
        ({"top_p": 0, "temperature": 1.5}, {"temperature": 0.0, "top_p": 1.0}),
        ({"temperature": 1e-40}, {"temperature": 0.0}),
        ({"logit_bias": {"50": -100, "7": 0.5}}, {"logit_bias": {50: -100, 7: 0.5}}),
    ],
    ids=str,
)
def test_sampling_parameters_mean(fields: dict[str, Any], wanted: dict[str, object]) -> None:
    for request in (translated(**fields), *completions_translated(**fields)):
        assert {name: getattr(request.sampling, name) for name in wanted} == wanted


def test_a_completion_has_16_tokens_by_default() -> None:
    [request] = completions_translated(priority=7)
    assert (request.max_tokens, request.priority) == (16, 7)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"max_tokens": -1}, None),
        ({"max_tokens": 0}, 16),
        ({"max_tokens": 0, "echo": True}, 0),
        ({"max_tokens": 8.0}, 8),
    ],
    ids=str,
)
def test_a_completion_that_names_no_limit_means_it(
    fields: dict[str, Any], wanted: int | None
) -> None:
    [request] = completions_translated(**fields)
    assert request.max_tokens == wanted


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        (90, 90.0),
        (0, 0.0),
        (0.5, 0.5),
        ("90", 90.0),
        ("90s", 90.0),
        ("5m", 300.0),
        (" 1.5 h ", 5400.0),
        (-1, -1.0),
        (-0.5, -1.0),
        ("-1", -1.0),
        (None, None),
    ],
)
def test_keep_alive_is_a_number_of_seconds_or_a_duration(
    keep_alive: object, seconds: float | None
) -> None:
    fields = {"keep_alive": keep_alive}
    for request in (translated(**fields), *completions_translated(**fields)):
        assert request.keep_alive == seconds


def test_more_choices_than_the_owner_allows_are_refused() -> None:
    body = chat_request(n=3)
    assert chat.to_inference(body, CALLER, max_choices=3).n == 3
    with pytest.raises(BadRequest) as refused:
        chat.to_inference(body, CALLER, max_choices=2)
    assert refused.value.param == "n"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt([1, 2])]),
        ([[1], [2, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
        ([1.0, 2], [TokenPrompt([1, 2])]),
        ([[1], [2.0, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, wanted: list[Any]) -> None:
    requests = completions_translated(prompt=prompt)
    assert [request.prompt for request in requests] == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"logprobs": 3}, None),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 3}, 3),
    ],
    ids=str,
)
def test_echo_asks_for_the_prompts_scores_only_where_they_are_needed(
    fields: dict[str, Any], wanted: int | None
) -> None:
    [request] = completions_translated(**fields)
    assert request.prompt_logprobs == wanted


# messages


def messages_of(*messages: dict[str, Any]) -> ChatPrompt:
    return chat_prompt(messages=list(messages))


def test_developer_means_system() -> None:
    prompt = messages_of({"role": "developer", "content": "Be brief."}, HELLO[0])
    assert prompt.messages[0] == {"role": "system", "content": "Be brief."}


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert messages_of({"role": "user", "content": parts}).messages[0]["content"] == "one\ntwo"


def test_a_last_assistant_message_is_continued() -> None:
    opening = {"role": "assistant", "content": "The answer is"}
    assert messages_of(HELLO[0], opening).continue_final
    assert not messages_of(HELLO[0], opening, HELLO[0]).continue_final


def test_an_empty_last_assistant_message_is_no_beginning() -> None:
    prompt = messages_of(HELLO[0], {"role": "assistant", "content": ""})
    assert not prompt.continue_final
    assert [message["role"] for message in prompt.messages] == ["user"]
    assert not messages_of({"role": "assistant", "content": None}).continue_final


def test_a_tool_round_trip_reaches_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    prompt = messages_of(
        HELLO[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    )
    assistant, result = prompt.messages[1:]
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "content": "42", "tool_call_id": "c1"}


def test_a_round_trip_of_functions_reaches_the_template_as_one_of_tools() -> None:
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assistant, result = messages_of(
        HELLO[0],
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "sunny"},
    ).messages[1:]
    made = assistant["tool_calls"][0]
    assert made["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert (result["role"], result["name"]) == ("tool", "weather")
    assert result["tool_call_id"] == made["id"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        ('{"a": "Eur', {"arguments": '{"a": "Eur'}),
        ("[1]", {"arguments": "[1]"}),
        ("null", {"arguments": "null"}),
        (f'{{"a": {2**70}}}', {"arguments": f'{{"a": {2**70}}}'}),
        ('{"a": "\\ud800"}', {"arguments": '{"a": "\\ud800"}'}),
        ('{"a":' * 9999, {"arguments": '{"a":' * 9999}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_in_the_history_are_an_object_whatever_was_written(
    arguments: object, wanted: dict[str, Any]
) -> None:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    prompt = messages_of(HELLO[0], {"role": "assistant", "tool_calls": [call]}, HELLO[0])
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == wanted
    prompt = messages_of(HELLO[0], {"role": "assistant", "function_call": function}, HELLO[0])
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == wanted


@pytest.mark.parametrize("said", [{"content": None}, {}, {"content": "", "tool_calls": []}])
def test_an_answer_that_is_all_thinking_is_taken_back(said: dict[str, Any]) -> None:
    thought = {"role": "assistant", "reasoning_content": "Hm.", **said}
    prompt = messages_of(HELLO[0], thought, HELLO[0])
    assert prompt.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert not messages_of(HELLO[0], thought).continue_final


def test_thoughts_come_back_by_either_name() -> None:
    for name in ("reasoning_content", "reasoning"):
        thought = {"role": "assistant", "content": "Well.", name: "Hm."}
        assert messages_of(HELLO[0], thought, HELLO[0]).messages[1]["reasoning_content"] == "Hm."
    unknown = {"role": "assistant", "content": "Well.", "reasoning": {"text": "Hm."}}
    assert "reasoning_content" not in messages_of(HELLO[0], unknown, HELLO[0]).messages[1]


# tools


def use_of(**fields: Any) -> ToolUse:
    use = chat_prompt(**fields).use
    assert use is not None
    return use


def names_of(use: ToolUse) -> list[str]:
    return [tool["function"]["name"] for tool in use.tools]


def test_tools_reach_the_template_as_it_reads_them() -> None:
    prompt = chat_prompt(tools=TOOLS)
    weather = {name: value for name, value in WEATHER["function"].items() if name != "strict"}
    clock = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    assert prompt.tools == [
        {"type": "function", "function": weather},
        {"type": "function", "function": clock},
    ]


def test_tools_may_be_called_unless_the_choice_says_otherwise() -> None:
    use = use_of(tools=TOOLS)
    assert (use.choice, use.parallel, names_of(use)) == ("auto", True, ["weather", "clock"])
    assert [tool["function"]["strict"] for tool in use.tools] == [True, False]
    required = use_of(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert (required.choice, required.parallel) == ("required", False)


def test_tools_that_may_not_be_called_are_still_shown() -> None:
    prompt = chat_prompt(tools=TOOLS, tool_choice="none")
    assert prompt.use is None
    assert prompt.tools is not None
    assert len(prompt.tools) == 2


def test_a_named_tool_is_called_once() -> None:
    use = use_of(tools=TOOLS, tool_choice=named("clock"))
    assert (use.choice, use.name, names_of(use), use.parallel) == (
        "named",
        "clock",
        ["clock"],
        False,
    )


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_the_only_ones_that_may_be_called(mode: str) -> None:
    allowed = {"mode": mode, "tools": [named("clock")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    use = use_of(tools=TOOLS, tool_choice=choice)
    assert (use.choice, names_of(use)) == (mode, ["clock"])


def test_functions_are_tools_in_an_old_form() -> None:
    functions = [tool["function"] for tool in TOOLS]
    old, new = translated(functions=functions), translated(tools=TOOLS, parallel_tool_calls=False)
    assert old == new
    use = use_of(functions=functions, function_call={"name": "clock"})
    assert (use.choice, use.name) == ("named", "clock")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": TOOLS, "tool_choice": named("unknown")}, "tool_choice"),
        ({"tool_choice": named("weather")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"function_call": {"name": "weather"}}, "tool_choice"),
        ({"tools": TOOLS, "functions": [CLOCK["function"]]}, "functions"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [named("unknown")]},
                },
            },
            "tool_choice",
        ),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_made_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        translated(**fields)
    assert refused.value.param == param


# constraints

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BINDING: list[tuple[dict[str, Any], Constraint]] = [
    (
        {"response_format": {"type": "json_object"}},
        Constraint("json_object", None, "response_format"),
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            }
        },
        Constraint("json_schema", SCHEMA, "response_format"),
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA, "strict": False},
            }
        },
        Constraint("json_schema", SCHEMA, "response_format"),
    ),
    (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        Constraint("json_schema", SCHEMA, "response_format"),
    ),
    ({"guided_json": SCHEMA}, Constraint("json_schema", SCHEMA, "guided_json")),
    ({"guided_json": json.dumps(SCHEMA)}, Constraint("json_schema", SCHEMA, "guided_json")),
    ({"json_schema": SCHEMA}, Constraint("json_schema", SCHEMA, "json_schema")),
    ({"guided_regex": "a+"}, Constraint("regex", "a+", "guided_regex")),
    ({"guided_choice": ["a", "b"]}, Constraint("choice", ["a", "b"], "guided_choice")),
    ({"guided_grammar": "start: /a/"}, Constraint("grammar", "start: /a/", "guided_grammar")),
    ({"grammar": 'root ::= "a"'}, Constraint("grammar", 'root ::= "a"', "grammar")),
    (
        {"structured_outputs": {"json": SCHEMA}},
        Constraint("json_schema", SCHEMA, "structured_outputs.json"),
    ),
    (
        {"structured_outputs": {"json_object": True}},
        Constraint("json_object", None, "structured_outputs.json_object"),
    ),
    (
        {"structured_outputs": {"regex": "a+", "json_object": False}},
        Constraint("regex", "a+", "structured_outputs.regex"),
    ),
    (
        {"structured_outputs": {"choice": ["a"]}},
        Constraint("choice", ["a"], "structured_outputs.choice"),
    ),
    (
        {"structured_outputs": {"grammar": "start: /a/"}},
        Constraint("grammar", "start: /a/", "structured_outputs.grammar"),
    ),
]


@pytest.mark.parametrize(("fields", "wanted"), BINDING, ids=str)
def test_every_way_to_bind_an_answer_is_one_constraint(
    fields: dict[str, Any], wanted: Constraint
) -> None:
    for request in (translated(**fields), *completions_translated(**fields)):
        assert request.constraint == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA, "guided_regex": "a"},
        {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"grammar": "x", "guided_grammar": "x"},
        {"guided_regex": "a", "ignore_eos": True},
    ],
    ids=str,
)
def test_an_answer_is_bound_once_and_to_its_end(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        translated(**fields)
    with pytest.raises(BadRequest):
        completions_translated(**fields)


def test_a_call_that_must_come_leaves_no_answer_to_bind() -> None:
    bound = {"tools": TOOLS, "guided_json": SCHEMA}
    assert translated(**bound).constraint is not None
    assert translated(**bound, tool_choice="none").constraint is not None
    assert translated(**bound, tool_choice="required").constraint is None
    assert translated(**bound, tool_choice=named("clock")).constraint is None


# thinking


def test_the_effort_of_thinking_is_the_templates_to_read() -> None:
    def variables(**fields: Any) -> dict[str, Any]:
        return chat_prompt(**fields).template_kwargs

    assert variables() == {}
    assert variables(reasoning_effort="minimal") == {"reasoning_effort": "minimal"}
    assert variables(reasoning_effort="low") == {
        "reasoning_effort": "low",
        "enable_thinking": True,
    }
    assert variables(reasoning_effort="none") == {
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    assert variables(thinking_budget=0) == {"thinking_budget": 0, "enable_thinking": False}
    assert variables(thinking_budget=-1) == {}
    assert variables(thinking_budget=9) == {"thinking_budget": 9}
    own = {"enable_thinking": True, "reasoning_effort": "high", "x": 1}
    assert variables(reasoning_effort="none", chat_template_kwargs=own) == own


@pytest.mark.parametrize("name", ["thinking_budget", "thinking_token_budget", "reasoning_budget"])
def test_a_thinking_budget_goes_by_the_names_it_has_elsewhere(name: str) -> None:
    def budget(value: int | None) -> int | None:
        return chat_prompt(**{name: value}).thinking_budget

    assert [budget(value) for value in (None, -1, 0, 100)] == [None, None, 0, 100]
    with pytest.raises(ValidationError):
        chat_request(**{name: -2})
