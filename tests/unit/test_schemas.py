"""OpenAI's wire formats: what is accepted, what it means, and how answers are written."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_server.api.generation import Header, Tally
from mlx_server.api.http.failures import invalid_request
from mlx_server.api.openai import chat, completions
from mlx_server.config import Settings
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import (
    Alternative,
    Caller,
    ChatPrompt,
    Constraint,
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    ToolCallDelta,
    ToolCallStart,
    ToolUse,
    Usage,
)
from mlx_server.schemas.openai.chat import (
    TOLERATED,
    UNSUPPORTED,
    ChatCompletionRequest,
    chat_logprobs,
)
from mlx_server.schemas.openai.completions import CompletionRequest, text_logprobs
from mlx_server.schemas.openai.constraints import MAX_CHARACTERS, MAX_DEPTH, MAX_KEYS, MAX_VALUES
from mlx_server.schemas.openai.tokens import TokenizeRequest
from mlx_server.schemas.openai.tools import MAX_TOOLS
from mlx_server.telemetry import Metrics, RequestTimer

HELLO = [{"role": "user", "content": "Hello"}]
CALLER = Caller("req_1")
HEADER = Header("chatcmpl-1", 1700000000, "m")


def chat_request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": HELLO} | fields)


def completion_request(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "Hello"} | fields)


def translated(**fields: Any) -> InferenceRequest:
    return chat.to_inference(chat_request(**fields), CALLER, Settings())


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
    assert translated(keep_alive=keep_alive).keep_alive == seconds
    body = completion_request(keep_alive=keep_alive)
    (request,) = completions.to_inference(body, CALLER, Settings())
    assert request.keep_alive == seconds


@pytest.mark.parametrize(
    "keep_alive", ["", "soon", "-5m", "5 weeks", "1e3", "inf", "٣m", "9" * 400, 10**400, True, [5]]
)
def test_a_keep_alive_that_is_no_duration_is_refused(keep_alive: object) -> None:
    with pytest.raises(ValidationError):
        chat_request(keep_alive=keep_alive)


def test_priority_is_passed_on() -> None:
    assert translated().priority == 0
    assert translated(priority=-3).priority == -3
    (request,) = completions.to_inference(completion_request(priority=7), CALLER, Settings())
    assert request.priority == 7


def messages_of(*messages: dict[str, Any]) -> ChatPrompt:
    prompt = translated(messages=list(messages)).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


def chunks_of(stream: bytes) -> list[dict[str, Any]]:
    lines = [line for line in stream.decode().split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# requests


def test_defaults_are_openais() -> None:
    request = translated()
    assert request.sampling.temperature == 1.0
    assert request.sampling.top_p == 1.0
    assert (request.n, request.seed, request.max_tokens, request.stop) == (1, None, None, ())
    assert request.logprobs is None
    assert completion_request().max_tokens == 16


def test_max_completion_tokens_wins() -> None:
    assert translated(max_tokens=5).max_tokens == 5
    assert translated(max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_stop_is_a_string_or_a_list() -> None:
    assert translated(stop="end").stop == ("end",)
    assert translated(stop=["a", "b"]).stop == ("a", "b")
    assert translated(stop=[]).stop == ()


def test_logit_bias_keys_become_token_ids() -> None:
    assert translated(logit_bias={"50": -100, "7": 0.5}).sampling.logit_bias == {50: -100, 7: 0.5}


def test_unlimited_top_k_is_0_or_minus_1() -> None:
    assert translated(top_k=-1).sampling.top_k == translated(top_k=0).sampling.top_k == 0


def test_top_p_0_takes_the_likeliest_token() -> None:
    sampling = translated(top_p=0, temperature=1.5).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_every_seed_of_64_bits_is_taken() -> None:
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert translated(seed=seed).seed == seed


def test_asking_for_logprobs_alone_reports_no_alternatives() -> None:
    assert translated(logprobs=True).logprobs == 0
    assert translated(logprobs=True, top_logprobs=4).logprobs == 4


def test_more_choices_than_the_owner_allows_are_refused() -> None:
    body = chat_request(n=3)
    assert chat.to_inference(body, CALLER, Settings(max_choices=3)).n == 3
    with pytest.raises(BadRequest) as refused:
        chat.to_inference(body, CALLER, Settings(max_choices=2))
    assert refused.value.param == "n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        chat_request(temperature=value)


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


def test_arguments_that_are_no_object_stay_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{oops"}}
    prompt = messages_of(HELLO[0], {"role": "assistant", "tool_calls": [call]}, HELLO[0])
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == "{oops"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat_request(**{name: {"some": "thing"}})
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none", "parallel_tool_calls": False},
        {"functions": [], "function_call": "auto"},
        {"response_format": {"type": "text"}, "grammar": ""},
        {"modalities": ["text"]},
        {"audio": None, "functions": None},
        dict.fromkeys(TOLERATED, "anything"),
        {name: {"any": ["thing"]} for name in TOLERATED},
    ],
    ids=str,
)
def test_fields_that_ask_for_nothing_change_nothing(fields: dict[str, Any]) -> None:
    assert translated(**fields) == translated()


# tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


def use_of(**fields: Any) -> ToolUse | None:
    prompt = translated(**fields).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt.use


def names_of(use: ToolUse | None) -> list[str]:
    assert use is not None
    return [tool["function"]["name"] for tool in use.tools]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_tools_reach_the_template_as_it_reads_them() -> None:
    prompt = translated(tools=TOOLS).prompt
    assert isinstance(prompt, ChatPrompt)
    weather = {name: value for name, value in WEATHER["function"].items() if name != "strict"}
    clock = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    assert prompt.tools == [
        {"type": "function", "function": weather},
        {"type": "function", "function": clock},
    ]


def test_tools_may_be_called_unless_the_choice_says_otherwise() -> None:
    use = use_of(tools=TOOLS)
    assert use is not None
    assert (use.choice, use.parallel, names_of(use)) == ("auto", True, ["weather", "clock"])
    assert [tool["function"]["strict"] for tool in use.tools] == [True, False]
    required = use_of(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert required is not None
    assert (required.choice, required.parallel) == ("required", False)


def test_tools_that_may_not_be_called_are_still_shown() -> None:
    prompt = translated(tools=TOOLS, tool_choice="none").prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.use is None
    assert prompt.tools is not None
    assert len(prompt.tools) == 2


def test_a_named_tool_is_called_once() -> None:
    use = use_of(tools=TOOLS, tool_choice=named("clock"))
    assert use is not None
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
    assert use is not None
    assert (use.choice, names_of(use)) == (mode, ["clock"])


def test_functions_are_tools_in_an_old_form() -> None:
    functions = [tool["function"] for tool in TOOLS]
    old, new = translated(functions=functions), translated(tools=TOOLS, parallel_tool_calls=False)
    assert old == new
    use = use_of(functions=functions, function_call={"name": "clock"})
    assert use is not None
    assert (use.choice, use.name) == ("named", "clock")


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


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "custom", "custom": {"name": "f"}},
        {"type": "web_search"},
        {"type": "function"},
        {"type": "function", "function": {"name": ""}},
        {"type": "function", "function": {"name": "a b"}},
        {"type": "function", "function": {"name": "a" * 65}},
        {"type": "function", "function": {"name": "f\n"}},
        {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}},
        {"type": "function", "function": {"name": "f", "parameters": []}},
        {"type": "function", "function": {"name": "f", "strict": "yes"}},
    ],
    ids=str,
)
def test_a_tool_that_is_no_function_is_refused(tool: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as invalid:
        chat_request(tools=[tool])
    body = {"model": "m", "messages": HELLO, "tools": [tool]}
    assert (invalid_request(invalid.value.errors(), body).param or "").startswith("tools.0")


def test_a_custom_tool_is_refused_in_plain_words() -> None:
    body = {"model": "m", "messages": HELLO, "tools": [{"type": "custom", "custom": {}}]}
    with pytest.raises(ValidationError) as invalid:
        ChatCompletionRequest.model_validate(body)
    assert "'custom' are not supported" in invalid_request(invalid.value.errors(), body).message


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
    assert translated(**fields).constraint == wanted
    (request,) = completions.to_inference(completion_request(**fields), CALLER, Settings())
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
    for refused_by in (chat_request, completion_request):
        with pytest.raises(BadRequest):
            refused_by(**fields)


def test_a_call_that_must_come_leaves_no_answer_to_bind() -> None:
    bound = {"tools": TOOLS, "guided_json": SCHEMA}
    assert translated(**bound).constraint is not None
    assert translated(**bound, tool_choice="none").constraint is not None
    assert translated(**bound, tool_choice="required").constraint is None
    assert translated(**bound, tool_choice=named("clock")).constraint is None


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(MAX_DEPTH + 1),
        {"enum": list(range(MAX_VALUES))},
        {"properties": {str(i): {} for i in range(MAX_KEYS + 1)}},
        {"const": "a" * MAX_CHARACTERS},
        {"properties": {"a" * MAX_CHARACTERS: {}}},
    ],
    ids=["deep", "long", "broad", "wordy", "of a huge name"],
)
def test_a_schema_beyond_all_measure_is_refused(schema: dict[str, Any]) -> None:
    assert chat_request(guided_json=nested(MAX_DEPTH)).constraint is not None
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": schema}}}
    bodies: list[dict[str, Any]] = [
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"json_schema": schema},
        {"structured_outputs": {"json": schema}},
        {"response_format": format},
        {"tools": [tool]},
        {"functions": [tool["function"]]},
    ]
    for body in bodies:
        with pytest.raises(ValidationError):
            chat_request(**body)


def test_more_tools_than_are_allowed_are_refused() -> None:
    tools = [named(f"f{i}") for i in range(MAX_TOOLS + 1)]
    assert len(names_of(use_of(tools=tools[:-1]))) == MAX_TOOLS
    with pytest.raises(ValidationError):
        chat_request(tools=tools)


# thinking


def test_the_effort_of_thinking_is_the_templates_to_read() -> None:
    def variables(**fields: Any) -> dict[str, Any]:
        prompt = translated(**fields).prompt
        assert isinstance(prompt, ChatPrompt)
        return prompt.template_kwargs

    assert variables() == {}
    assert variables(reasoning_effort="low") == {"reasoning_effort": "low"}
    assert variables(reasoning_effort="none") == {
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    assert variables(thinking_budget=0) == {"enable_thinking": False}
    own = {"enable_thinking": True, "reasoning_effort": "high", "x": 1}
    assert variables(reasoning_effort="none", chat_template_kwargs=own) == own


@pytest.mark.parametrize("name", ["thinking_budget", "thinking_token_budget", "reasoning_budget"])
def test_a_thinking_budget_goes_by_the_names_it_has_elsewhere(name: str) -> None:
    def budget(value: int | None) -> int | None:
        prompt = translated(**{name: value}).prompt
        assert isinstance(prompt, ChatPrompt)
        return prompt.thinking_budget

    assert [budget(value) for value in (None, -1, 0, 100)] == [None, None, 0, 100]
    with pytest.raises(ValidationError):
        chat_request(**{name: -2})


def test_only_one_thing_is_tokenized() -> None:
    for fields in ({}, {"prompt": "a", "content": "a"}, {"prompt": "a", "messages": HELLO}):
        with pytest.raises(BadRequest):
            TokenizeRequest.model_validate({"model": "m"} | fields)
    assert TokenizeRequest.model_validate({"model": "m", "prompt": ""}).text == ""


def test_best_of_must_equal_n() -> None:
    assert completion_request(best_of=1, suffix="").n == 1
    assert completion_request(best_of=2, n=2).n == 2
    with pytest.raises(BadRequest, match="best_of"):
        completion_request(best_of=2)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt([1, 2])]),
        ([[1], [2, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, wanted: list[Any]) -> None:
    body = completion_request(prompt=prompt)
    requests = completions.to_inference(body, CALLER, Settings())
    assert [request.prompt for request in requests] == wanted


def test_echo_asks_for_the_prompts_scores_only_where_they_are_needed() -> None:
    def asked(**fields: Any) -> int | None:
        return completions.to_inference(completion_request(**fields), CALLER, Settings())[
            0
        ].prompt_logprobs

    assert asked() is None
    assert asked(logprobs=3) is None
    assert asked(echo=True) is None
    assert asked(echo=True, logprobs=3) == 3


def test_the_branch_of_a_union_that_was_meant_is_named() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    with pytest.raises(ValidationError) as invalid:
        ChatCompletionRequest.model_validate(body)
    error = invalid_request(invalid.value.errors(), body)
    assert error.param == "messages.0.content.0"
    assert "text only" in error.message


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    body = {"model": "m", "messages": HELLO, "temperature": "secret " * 1000}
    with pytest.raises(ValidationError) as invalid:
        ChatCompletionRequest.model_validate(body)
    error = invalid_request(invalid.value.errors(), body)
    assert "secret" not in error.message


# answers

USAGE = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=3)


def scored(token: str, logprob: float | None, offset: int, *top: tuple[str, float]) -> TokenLogprob:
    others = tuple(Alternative(text, text.encode(), value) for text, value in top)
    return TokenLogprob(token, token.encode(), logprob, others, offset)


def test_a_chat_answer_has_its_required_keys_when_they_are_null() -> None:
    answer = chat.ChatAnswer(HEADER, chat_request())
    answer.feed(0, TextDelta(0, "Hel"))
    answer.feed(0, TextDelta(0, "lo"))
    answer.feed(0, Finished(0, "stop", USAGE))
    body = json.loads(answer.body(USAGE))
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert body["object"] == "chat.completion"


CALLS: list[Event] = [
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "see."),
    ToolCallStart(0, 0, "c1", "weather"),
    ToolCallDelta(0, 0, '{"city": '),
    ToolCallDelta(0, 0, '"Rome"}'),
    ToolCallStart(0, 1, "c2", "clock"),
    ToolCallDelta(0, 1, "{}"),
    Finished(0, "tool_calls", USAGE),
]


def answered(body: ChatCompletionRequest, events: list[Event]) -> dict[str, Any]:
    """The only choice of the whole answer."""
    answer = chat.ChatAnswer(HEADER, body)
    for event in events:
        answer.feed(0, event)
    choice: dict[str, Any] = json.loads(answer.body(USAGE))["choices"][0]
    return choice


def streamed(body: ChatCompletionRequest, events: list[Event]) -> list[dict[str, Any]]:
    """The deltas of the only choice."""
    stream = chat.ChatStream(HEADER, body)
    data = stream.begin() + b"".join(stream.feed(0, event) for event in events)
    return [chunk["choices"][0]["delta"] for chunk in chunks_of(data)]


def test_an_answer_that_only_calls_tools_has_no_content() -> None:
    choice = answered(chat_request(tools=TOOLS), CALLS)
    weather = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Let me see.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": weather},
            {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
        ],
    }
    assert choice["finish_reason"] == "tool_calls"


def test_text_before_a_call_is_kept() -> None:
    choice = answered(chat_request(tools=TOOLS), [TextDelta(0, "Sure: "), *CALLS])
    assert choice["message"]["content"] == "Sure: "
    assert len(choice["message"]["tool_calls"]) == 2


def test_calls_stream_their_names_first_and_then_their_arguments() -> None:
    weather, clock = {"name": "weather", "arguments": ""}, {"name": "clock", "arguments": ""}
    assert streamed(chat_request(tools=TOOLS), CALLS) == [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": weather}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": clock}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]


def test_who_asks_for_functions_is_answered_in_the_old_form() -> None:
    body = chat_request(functions=[WEATHER["function"]])
    events = [*CALLS[2:5], CALLS[-1]]
    choice = answered(body, events)
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choice["message"]["function_call"] == call
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "function_call"
    assert streamed(body, events) == [
        {"role": "assistant", "content": None},
        {"function_call": {"name": "weather", "arguments": ""}},
        {"function_call": {"arguments": '{"city": '}},
        {"function_call": {"arguments": '"Rome"}'}},
        {},
    ]


def test_a_chat_stream_opens_with_the_role_and_closes_with_the_reason() -> None:
    stream = chat.ChatStream(HEADER, chat_request())
    text = stream.feed(0, TextDelta(0, "Hi"))
    chunks = chunks_of(stream.begin() + text + stream.feed(0, Finished(0, "length", USAGE)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert stream.end(USAGE) == b""


def test_usage_is_null_until_the_last_chunk_when_it_was_asked_for() -> None:
    stream = chat.ChatStream(HEADER, chat_request(stream_options={"include_usage": True}))
    *chunks, last = chunks_of(
        stream.begin() + stream.feed(0, Finished(0, "stop", USAGE)) + stream.end(USAGE)
    )
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7


def test_every_choice_of_a_stream_opens() -> None:
    chunks = chunks_of(chat.ChatStream(HEADER, chat_request(n=3)).begin())
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 2]


def test_text_with_line_ends_stays_one_event() -> None:
    stream = chat.ChatStream(HEADER, chat_request())
    data = stream.feed(0, TextDelta(0, "a\n\nb\r\nc\u2028d"))
    assert data.count(b"\n") == 2
    assert chunks_of(data)[0]["choices"][0]["delta"]["content"] == "a\n\nb\r\nc\u2028d"


def test_minus_infinity_is_written_as_a_number() -> None:
    told = chat_logprobs([scored("a", -math.inf, 0, ("b", -0.5))])
    assert json.loads(told.to_json()) == {
        "content": [
            {
                "token": "a",
                "logprob": -9999.0,
                "bytes": [97],
                "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }


def test_a_completion_lists_the_token_among_its_alternatives() -> None:
    told = text_logprobs([scored("a", -2.0, 3, ("b", -0.5), ("b", -1.5))], start=10)
    assert told.top_logprobs == [{"b": -0.5, "a": -2.0}]
    assert told.text_offset == [13]


def test_choices_are_numbered_prompt_by_prompt() -> None:
    body = completion_request(prompt=["x", "y"], n=2)
    answer = completions.CompletionAnswer(HEADER, body)
    for prompt, choice in ((1, 0), (0, 1), (0, 0), (1, 1)):
        answer.feed(prompt, TextDelta(choice, f"{prompt}{choice}"))
        answer.feed(prompt, Finished(choice, "length", USAGE))
    choices = json.loads(answer.body(USAGE))["choices"]
    assert [(one["index"], one["text"]) for one in choices] == [
        (0, "00"),
        (1, "01"),
        (2, "10"),
        (3, "11"),
    ]


def test_the_prompt_of_several_choices_counts_once() -> None:
    tally = Tally(RequestTimer(Metrics()))
    for prompt, choice, cached in ((0, 0, 0), (0, 1, 5), (1, 0, 4)):
        tally.feed(prompt, Finished(choice, "stop", Usage(5, 2, cached)))
    assert tally.finish() == Usage(prompt_tokens=10, completion_tokens=6, cached_tokens=4)


def test_echo_puts_the_prompt_and_its_scores_in_front() -> None:
    body = completion_request(prompt="ab", echo=True, logprobs=1)
    header = replace(HEADER, prompts=("ab",))
    events: list[Event] = [
        PromptScored((scored("a", None, 0), scored("b", -1.0, 1, ("c", -0.1)))),
        TextDelta(0, "c", (scored("c", -0.2, 0),)),
        Finished(0, "length", USAGE),
    ]
    answer = completions.CompletionAnswer(header, body)
    stream = completions.CompletionStream(header, body)
    streamed = stream.begin()
    for event in events:
        answer.feed(0, event)
        streamed += stream.feed(0, event)
    (choice,) = json.loads(answer.body(USAGE))["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -0.2],
        "top_logprobs": [None, {"c": -0.1, "b": -1.0}, {"c": -0.2}],
        "text_offset": [0, 1, 2],
    }
    pieces = [chunk["choices"][0] for chunk in chunks_of(streamed)]
    assert "".join(piece["text"] for piece in pieces) == "abc"
    offsets = [piece["logprobs"]["text_offset"] for piece in pieces if piece["logprobs"]]
    assert offsets == [[0, 1], [2]]


def test_echo_of_token_ids_shows_their_text() -> None:
    header = replace(HEADER, prompts=("é", "f"))
    stream = completions.CompletionStream(header, completion_request(prompt=[[1], [2]], echo=True))
    pieces = [chunk["choices"][0] for chunk in chunks_of(stream.begin())]
    assert [(piece["index"], piece["text"]) for piece in pieces] == [(0, "é"), (1, "f")]
