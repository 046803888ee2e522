"""Tool calls over HTTP, in each family's syntax: random models must call, scripted ones choose."""

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.support.server import CHAT, Server, chat, serving, settled, stream_data
from tests.support.tiny import FAMILIES, build_scripted_model, build_tiny_model

FORECAST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": -99}, "b": {"const": 2}},
    "required": ["a"],
    "additionalProperties": False,
}
SCHEMAS = {"forecast": FORECAST, "add": ADD}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]

STYLES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "hermes": ("qwen", (), ""),
    "qwen-coder": ("qwen", (), "<tool_call>\n<function="),
    "llama": ("llama", (), "<|python_tag|>"),
    "mistral": ("mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]"),
    "mistral-headers": ("mistral", ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS][ARGS]"),
    "gemma": ("gemma", ("<|tool_call>", "<tool_call|>", '<|"|>'), "<|tool_call><tool_call|>"),
    "function-gemma": (
        "gemma",
        ("<start_function_call>", "<end_function_call>", "<escape>"),
        "<start_function_call>",
    ),
    "phi": ("phi", ("<|tool_call|>", "<|/tool_call|>"), "<|tool_call|>"),
    "kimi": ("generic", (), "<|tool_calls_section_begin|>"),
    "pythonic": ("generic", (), "<|tool_call_start|>"),
    "untaught": ("generic", (), ""),
}
"""By the name of a model: its family, tokens that it has besides, and what its template shows."""

LOOK = '<tool_call>\n{"name": "forecast", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": "}</tool_call>"}}\n</tool_call>'
SCRIPTS = {
    "one-call": f"I shall look.\n\n{LOOK}",
    "two-calls": f"{LOOK}\n{SUM}",
    "freeform": '<tool_call>\n{"name": "run", "arguments": '
    r'{"input": "ls \"/tmp\"\n# \\ \u00e9"}}'
    "\n</tool_call>",
    "unknown-tool": 'So:\n<tool_call>\n{"name": "drop", "arguments": {}}\n</tool_call>',
    "no-json": "Hm <tool_call>forecast for Rome</tool_call> it is.",
    "cut-off": '<tool_call>{"name": "add", "arguments": {"a": ',
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a random model for each syntax and a scripted one for each script."""
    home = tmp_path_factory.mktemp("tools")
    for name, (family, extra, shown) in STYLES.items():
        marks = f"{{#- tools {shown} -#}}" if shown else ""
        build_tiny_model(
            home / "models" / name,
            family,
            extra_tokens=extra,
            template=marks + FAMILIES[family].template,
            context=4096,
        )
    for name, script in SCRIPTS.items():
        # The prompt must not end in a token of the script.
        template = FAMILIES["qwen"].template + "{{- 'A' }}"
        build_scripted_model(home / "models" / name, script, family="qwen", template=template)
    with serving(home, max_models=6) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


# answers


@dataclass
class Choice:
    """A choice of an answer, streamed or whole, put together."""

    content: str | None = None
    reasoning: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    deltas: list[dict[str, Any]] = field(default_factory=list)

    def take(self, choice: dict[str, Any]) -> None:
        """Add what a whole answer or a chunk says."""
        said = choice.get("message") or choice["delta"]
        self.deltas.append(said)
        if said.get("content"):
            self.content = (self.content or "") + said["content"]
        if said.get("reasoning_content"):
            self.reasoning = (self.reasoning or "") + said["reasoning_content"]
        for call in said.get("tool_calls") or ():
            index = call.get("index", len(self.calls))
            if index == len(self.calls):
                assert call["id"].startswith("call_")
                self.calls.append(dict(call[call["type"]]))
            else:
                assert index == len(self.calls) - 1
                assert "id" not in call
                told = call.get("function") or call["custom"]
                self.calls[index] |= {name: self.calls[index][name] + told[name] for name in told}
        self.reason = choice["finish_reason"] or self.reason

    @property
    def told(self) -> tuple[Any, ...]:
        """What must not depend on whether the answer is streamed."""
        return self.content, self.reasoning, self.calls, self.reason


@dataclass
class Reply:
    """An answer to a chat, streamed or whole."""

    choices: list[Choice]
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, body: dict[str, Any]) -> None:
        assert "error" not in body, body
        for choice in body["choices"]:
            self.choices[choice["index"]].take(choice)
        self.usage = settled(body.get("usage")) or self.usage


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
    """The answer in one piece."""
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    reply = Reply([Choice() for _ in range(body.get("n", 1))])
    reply.take(answer.json())
    return reply


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
    """The answer as a stream, put together."""
    reply = Reply([Choice() for _ in range(body.get("n", 1))])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", CHAT, json=body | options) as response:
        assert response.status_code == 200, await response.aread()
        async for data in stream_data(response):
            if data != "[DONE]":
                reply.take(json.loads(data))
    return reply


async def both(client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
    """The streamed answer, which is the same as the whole one."""
    one, other = await whole(client, body), await streamed(client, body)
    assert [choice.told for choice in one.choices] == [choice.told for choice in other.choices]
    counts = ("prompt_tokens", "completion_tokens", "completion_tokens_details")
    assert [one.usage[name] for name in counts] == [other.usage[name] for name in counts]
    return other


def asking(model: str, **more: Any) -> dict[str, Any]:
    return chat(model, tools=TOOLS, max_tokens=400) | more


def wild(model: str, **more: Any) -> dict[str, Any]:
    """The body of a request to a random model, which would think for ever."""
    wilder = {"temperature": 1, "seed": 5, "n": 4, "thinking_budget": 8, "max_tokens": 3000}
    return asking(model, **wilder) | more


def each_style(*names: str) -> pytest.MarkDecorator:
    """Tests of each syntax, those beyond `names` only in long runs; all tests of one come together,
    for a model's sake."""
    often = [one if one in names else pytest.param(one, marks=pytest.mark.soak) for one in STYLES]
    return pytest.mark.parametrize("model", often, scope="module")


# forced calls


@each_style(*STYLES)
@pytest.mark.parametrize(
    ("named", "rounds"),
    [
        pytest.param(False, 1, id="required"),
        pytest.param(True, 1, marks=pytest.mark.soak, id="named"),
        pytest.param(False, 7, marks=pytest.mark.soak, id="required, often"),
        pytest.param(True, 7, marks=pytest.mark.soak, id="named, often"),
    ],
)
async def test_a_forced_call_validates_in_each_familys_syntax_whole_and_streamed(
    client: httpx.AsyncClient, model: str, named: bool, rounds: int
) -> None:
    choice = {"type": "function", "function": {"name": "forecast"}} if named else "required"
    count = 4 if rounds > 1 else 2
    replies = [
        await both(client, wild(model, tool_choice=choice, seed=12 + i, n=count))
        for i in range(rounds)
    ]
    for one in (one for reply in replies for one in reply.choices):
        assert (one.reason, one.content) == ("tool_calls", None)
        assert one.calls
        for call in one.calls:
            Draft202012Validator(SCHEMAS[call["name"]]).validate(json.loads(call["arguments"]))
        if named:
            assert [call["name"] for call in one.calls] == ["forecast"]


@each_style("hermes", "mistral", "qwen-coder")
async def test_one_call_alone_is_forced_where_there_may_be_one(
    client: httpx.AsyncClient, model: str
) -> None:
    reply = await both(client, wild(model, tool_choice="required", parallel_tool_calls=False))
    assert [len(one.calls) for one in reply.choices] == [1] * 4


async def test_a_forced_answer_ends_with_the_first_call_that_it_repeats(
    client: httpx.AsyncClient,
) -> None:
    ping = {"type": "function", "function": {"name": "ping"}}
    for model in ("hermes", "qwen-coder"):
        reply = await both(client, wild(model, tools=[ping], tool_choice="required"))
        for one in reply.choices:
            assert one.told == (
                None,
                one.reasoning,
                [{"name": "ping", "arguments": "{}"}],
                "tool_calls",
            )


async def test_parallel_calls_are_few_and_all_different(client: httpx.AsyncClient) -> None:
    reply = await both(client, wild("mistral", tools=TOOLS[1:], tool_choice="required"))
    for one in reply.choices:
        calls = [call["arguments"] for call in one.calls]
        assert one.reason == "tool_calls"
        assert 1 <= len(calls) == len(set(calls)) <= 16


async def test_calls_are_whole_and_valid_though_their_engine_was_killed_amid_them(
    server: Server, client: httpx.AsyncClient
) -> None:
    text = {"type": "string", "pattern": "^[a-z]{300}$"}
    schema = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    tool = {"type": "function", "function": {"name": "spell", "parameters": schema}}
    body = wild("hermes", tools=[tool], tool_choice="required", parallel_tool_calls=False)
    reply = Reply([Choice() for _ in range(body["n"])])
    killed = False
    async with client.stream("POST", CHAT, json=body | {"stream": True}) as response:
        async for data in stream_data(response):
            if data != "[DONE]":
                reply.take(json.loads(data))
            if not killed and all(choice.calls for choice in reply.choices):
                assert not any(choice.reason for choice in reply.choices)
                os.kill((await server.models())["hermes"]["pid"], signal.SIGKILL)
                killed = True
    assert killed
    for choice in reply.choices:
        assert choice.reason == "tool_calls"
        [call] = choice.calls
        Draft202012Validator(schema).validate(json.loads(call["arguments"]))


PATCH = r"""start: begin hunk~1..2 end
begin: "*** Begin" LF
end: "*** End" LF?
hunk: "*** Add: " name LF line~1..2 -> added
name: /[a-z\/"\\]{1,9}/
line: ("+" | "-") /[^\n]{0,9}/ LF
%import common.LF
"""
PATCHED = re.compile(
    r'\*\*\* Begin\n(\*\*\* Add: [a-z/"\\]{1,9}\n([+-][^\n]{0,9}\n){1,2}){1,2}\*\*\* End\n?'
)


def custom(name: str, syntax: str, definition: str) -> dict[str, Any]:
    form = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": {"name": name, "format": form}}


@each_style("hermes", "qwen-coder", "gemma", "pythonic")
async def test_a_custom_tools_grammar_is_kept_in_each_familys_syntax(
    client: httpx.AsyncClient, model: str
) -> None:
    tools = [custom("patch", "lark", PATCH), custom("code", "regex", r"^[a-z]{3}\n\d+\"$")]
    body = wild(model, tools=tools, n=2, parallel_tool_calls=False)
    for name, form in (("patch", PATCHED), ("code", re.compile(r"[a-z]{3}\n[0-9]+\""))):
        choice = {"type": "custom", "custom": {"name": name}}
        for one in (await both(client, body | {"tool_choice": choice})).choices:
            [call] = one.calls
            assert call["name"] == name
            assert form.fullmatch(call["input"]), call


async def test_a_custom_tools_input_is_text_in_answers_streams_and_the_history(
    client: httpx.AsyncClient,
) -> None:
    tools: list[dict[str, Any]] = [{"type": "custom", "custom": {"name": "run"}}]
    [choice] = (await both(client, asking("freeform", tools=tools))).choices
    [call] = choice.calls
    assert call == {"name": "run", "input": 'ls "/tmp"\n# \\ \u00e9'}
    told = {"id": "c1", "type": "custom", "custom": call}
    result = {"role": "tool", "tool_call_id": "c1", "content": "a"}
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [told]}]
    body = {"messages": [*history, result, {"role": "user", "content": "."}], "tools": tools}
    again = await both(client, asking("freeform") | body)
    assert again.choices[0].calls == [call]


@pytest.mark.parametrize(
    "definition",
    ["start: other", 'other: "a"', "start: (", "start: /[/", 'start: "a" % b', 'start: "a" .'],
)
async def test_a_custom_tools_grammar_that_is_none_is_refused(
    client: httpx.AsyncClient, definition: str
) -> None:
    body = asking("hermes", tools=[custom("f", "lark", definition)])
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "tools"


ODD = ["catalog.get-entity", f"mcp__{'a' * 70}", 'φ"}</tool_call>']


@each_style(*STYLES)
async def test_tools_keep_their_names_in_syntaxes_that_cannot_spell_them(
    client: httpx.AsyncClient, model: str
) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ODD]
    body = wild(model, tools=tools, tool_choice="required", parallel_tool_calls=False)
    calls = [one.calls for one in (await whole(client, body)).choices]
    assert [len(made) for made in calls] == [1] * 4
    assert {made[0]["name"] for made in calls} <= set(ODD)


# calls at will


async def test_text_before_a_call_is_kept_and_the_call_comes_in_pieces(
    client: httpx.AsyncClient,
) -> None:
    [choice] = (await both(client, asking("one-call"))).choices
    assert choice.content == "I shall look."
    assert choice.calls == [{"name": "forecast", "arguments": '{"city": "Rome", "days": 3}'}]
    assert choice.reason == "tool_calls"
    calls = [delta["tool_calls"][0] for delta in choice.deltas if delta.get("tool_calls")]
    assert calls[0]["function"] == {"name": "forecast", "arguments": ""}
    assert len(calls) > 3


async def test_several_calls_are_told_apart(client: httpx.AsyncClient) -> None:
    body = asking("two-calls")
    reply = await both(client, body)
    assert [call["name"] for call in reply.choices[0].calls] == ["forecast", "add"]
    assert json.loads(reply.choices[0].calls[1]["arguments"]) == {"a": 17, "b": "}</tool_call>"}
    one = await both(client, body | {"parallel_tool_calls": False})
    assert one.choices[0].calls == reply.choices[0].calls[:1]
    assert one.choices[0].reason == "tool_calls"
    assert one.usage["completion_tokens"] < reply.usage["completion_tokens"]


@pytest.mark.parametrize("model", ["unknown-tool", "no-json"])
async def test_what_is_no_call_is_given_back_as_text(client: httpx.AsyncClient, model: str) -> None:
    [choice] = (await both(client, asking(model))).choices
    assert (choice.content, choice.calls, choice.reason) == (SCRIPTS[model], [], "stop")


async def test_a_call_that_the_limit_cuts_off_ends_for_that_reason(
    client: httpx.AsyncClient,
) -> None:
    [choice] = (await both(client, asking("one-call", max_tokens=12))).choices
    assert choice.reason == "length"
    [choice] = (await both(client, asking("cut-off"))).choices
    assert (choice.calls, choice.reason) == ([{"name": "add", "arguments": '{"a": '}], "tool_calls")


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}], ids=str)
async def test_a_call_is_text_where_none_may_be_made(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    [choice] = (await both(client, asking("two-calls", **fields))).choices
    assert (choice.content, choice.calls, choice.reason) == (SCRIPTS["two-calls"], [], "stop")


async def test_stop_strings_end_the_text_and_not_a_call(client: httpx.AsyncClient) -> None:
    [choice] = (await both(client, asking("one-call", stop=["Rome", "forecast"]))).choices
    assert (choice.content, len(choice.calls)) == ("I shall look.", 1)
    [choice] = (await both(client, asking("one-call", stop=["look"]))).choices
    assert (choice.content, choice.calls, choice.reason) == ("I shall ", [], "stop")
