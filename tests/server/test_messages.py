"""Anthropic's Messages over HTTP: events, sameness with chat completions, agents, refusals."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.support import server as chat_completions
from tests.support.anthropic import (
    CLOCK,
    COUNT,
    HELLO,
    MESSAGES,
    TOOLS,
    VERSION,
    WEATHER,
    WEB_SEARCH,
    assert_refused,
    body_of,
    both,
    prompt_tokens,
    read_events,
    texts,
    whole,
)
from tests.support.server import CHAT, Server, serving
from tests.support.tiny import build_scripted_model, build_tiny_model

RANDOM, SCRIPTED = "random", "scripted"
ALIAS = "claude-random"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
SCRIPT = f"<think>Shall I?</think>I will look.{CALL}"
LOOSE = [WEATHER | {"strict": False}, CLOCK, WEB_SEARCH]
"""Tools that bind the scripted model to nothing but its script."""
CONTEXT = 8192
PING = 0.1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a random model that knows thinking and tools, and one that thinks and calls."""
    home = tmp_path_factory.mktemp("messages")
    build_tiny_model(home / "models" / RANDOM, "qwen3", context=CONTEXT)
    build_scripted_model(home / "models" / SCRIPTED, SCRIPT, family="qwen3")
    flags = ("--model", RANDOM, "--model", SCRIPTED)
    with serving(
        home, *flags, ping_interval=PING, max_body_bytes=1 << 20, aliases={ALIAS: RANDOM}
    ) as server:
        yield server


@pytest.fixture(scope="module")
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


# events


async def test_thinking_text_and_calls_are_the_same_streamed_and_whole(
    client: httpx.AsyncClient,
) -> None:
    message = await both(client, body_of(SCRIPTED, tools=LOOSE))
    thinking, text, call = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking == "Shall I?"
    assert text.type == "text"
    assert text.text == "I will look."
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", {"city": "Rome"})
    assert message.stop_reason == "tool_use"
    hidden = {"type": "adaptive", "display": "omitted"}
    kept = (await both(client, body_of(SCRIPTED, tools=LOOSE, thinking=hidden))).content[0]
    assert kept.type == "thinking"
    assert kept.thinking == ""
    answered = {"role": "assistant", "content": [kept.model_dump(), text.model_dump()]}
    shown = {"role": "assistant", "content": [thinking.model_dump(), text.model_dump()]}
    counted = [await count(client, [*HELLO, one]) for one in (answered, shown)]
    assert counted[0] == counted[1] > await count(client, [*HELLO, answered | {"content": "I"}])


async def count(client: httpx.AsyncClient, messages: list[dict[str, Any]], **more: Any) -> int:
    answer = await client.post(COUNT, json={"model": RANDOM, "messages": messages} | more)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


@pytest.mark.parametrize(
    ("fields", "reason", "stop"),
    [
        ({"max_tokens": 5}, "max_tokens", None),
        ({"stop_sequences": ["nothing", "will l"]}, "stop_sequence", "will l"),
        ({"tools": LOOSE}, "tool_use", None),
        ({}, "end_turn", None),
    ],
    ids=str,
)
async def test_an_answer_says_why_it_ended(
    client: httpx.AsyncClient, fields: dict[str, Any], reason: str, stop: str | None
) -> None:
    message = await both(client, body_of(SCRIPTED, **fields))
    assert (message.stop_reason, message.stop_sequence) == (reason, stop)


async def test_an_answer_that_fills_the_context_says_so(client: httpx.AsyncClient) -> None:
    """Of a scripted model, whose context is smaller."""
    filler = [{"role": "user", "content": "!" * 2025}]
    message = await whole(client, body_of(SCRIPTED, messages=filler, max_tokens=100))
    assert message.stop_reason == "model_context_window_exceeded"
    assert 0 < message.usage.output_tokens < 15


async def test_a_long_prefill_is_pinged_with_events(client: httpx.AsyncClient) -> None:
    long = [{"role": "user", "content": "!" * 6000}]
    events = await read_events(client, body_of(RANDOM, messages=long, max_tokens=2))
    events.check()
    assert events.pings > 1


# sameness


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"model": SCRIPTED}, {"model": SCRIPTED}),
        ({}, {}),
        (
            {"system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
            {"messages": [{"role": "system", "content": "Be\nkind."}, *HELLO]},
        ),
        (
            {"tools": TOOLS, "thinking": {"type": "disabled"}},
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "weather",
                            "description": WEATHER["description"],
                            "parameters": WEATHER["input_schema"],
                            "strict": True,
                        },
                    },
                    {"type": "function", "function": {"name": "clock"}},
                ],
                "reasoning_effort": "none",
            },
        ),
    ],
    ids=["scripted", "plain", "system", "tools"],
)
async def test_chat_completions_say_the_same_with_the_same_usage(
    client: httpx.AsyncClient, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    message = await both(client, body_of(RANDOM, temperature=0, max_tokens=24) | ours)
    other = chat_completions.chat(RANDOM, messages=HELLO, max_tokens=24) | theirs
    answer = (await client.post(CHAT, json=other)).json()
    said = answer["choices"][0]["message"]
    thoughts = [one.thinking for one in message.content if one.type == "thinking"]
    assert "".join(texts(message)) == (said["content"] or "")
    assert "".join(thoughts) == said.get("reasoning_content", "")
    assert prompt_tokens(message) == answer["usage"]["prompt_tokens"]
    assert message.usage.output_tokens == answer["usage"]["completion_tokens"]


# agents

WORK = (
    "You are a program that works on files. Look before you write, and test what you wrote. " * 20
)


def agent_turns(turns: int) -> Iterator[dict[str, Any]]:
    """What an agent sends: its head changes each time, and a step is added to its work."""
    names = ("read", "edit", "run", "finish")
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    tools = [
        {"name": one, "description": f"Use {one} on a file. " * 8, "input_schema": schema}
        for one in names
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Mend the file."}]
    for turn in range(turns):
        header = f"x-anthropic-billing-header: cc_version=2.1.37.{turn:03x}; cch={turn * 7919:05x};"
        system = [
            {"type": "text", "text": header},
            {"type": "text", "text": WORK, "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": f"Current time: 2026-11-26 13:{turn:02}:30\nThe OS is Linux."},
        ]
        left = f"<total_tokens>{15_000_000 - 977 * turn} tokens left</total_tokens>"
        reminder = {"role": "system", "content": left}
        yield {"system": system, "tools": tools, "messages": [*messages, reminder]}
        used = {"path": f"/src/file{turn}.py"}
        call = {"type": "tool_use", "id": f"toolu_{turn}", "name": names[turn % 4], "input": used}
        thought = {"type": "thinking", "thinking": f"Step {turn} is next.", "signature": "s"}
        result = {"type": "tool_result", "tool_use_id": f"toolu_{turn}", "content": f"{turn} ok."}
        messages += [
            {"role": "assistant", "content": [thought, {"type": "text", "text": "So."}, call]},
            {"role": "user", "content": [result]},
        ]


async def test_an_agent_whose_head_changes_prefills_only_what_is_new(
    client: httpx.AsyncClient,
) -> None:
    before, shares = 0, []
    for turn in agent_turns(20):
        asked = body_of(RANDOM, max_tokens=8, temperature=0, **turn)
        message = await whole(client, asked)
        read = message.usage.cache_read_input_tokens or 0
        if before:
            shares.append(read / before)
        before = prompt_tokens(message)
        assert before == await count(client, **turn)
    print(f"{min(shares):.3f} at least of a prompt of {before} tokens at last")
    assert before > 1500
    assert min(shares) >= 0.95


async def test_a_request_as_a_coding_agent_sends_it_is_answered(client: httpx.AsyncClient) -> None:
    marked: dict[str, Any] = {"cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "org"}}
    reminder = "<system-reminder>\nToday's date is 2026-11-26.\n</system-reminder>"
    used = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "/a"}}
    result = {"tool_use_id": "toolu_1", "type": "tool_result", "content": [], "is_error": False}
    thought = {"type": "thinking", "thinking": "", "signature": "EqQBCkYIBRgCKkD"}
    body = body_of(
        SCRIPTED,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.9; cch=0;"},
            {"type": "text", "text": "You are an agent.", **marked},
        ],
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": reminder}, {"type": "text", "text": "Go."}],
            },
            {"role": "assistant", "content": [thought, used | {"caller": {"type": "direct"}}]},
            {"role": "user", "content": [result | marked]},
            {"role": "system", "content": "<total_tokens>9 tokens left</total_tokens>"},
        ],
        tools=[
            {
                "name": "Read",
                "description": "Reads a file.",
                "eager_input_streaming": True,
                "defer_loading": False,
                "input_schema": {
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "type": "object",
                    "properties": {"file_path": {"type": "string"}},
                    "required": ["file_path"],
                    "additionalProperties": False,
                },
            },
            WEB_SEARCH,
        ],
        temperature=1,
        metadata={"user_id": "{}"},
        thinking={"type": "adaptive"},
        output_config={"effort": "medium"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        max_tokens=32000,
    )
    message = (await read_events(client, body)).message
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.usage.cache_creation_input_tokens or 0) > 0


# models and headers


async def test_models_are_told_in_the_shape_that_is_asked_for(client: httpx.AsyncClient) -> None:
    ours = (await client.get("/v1/models", headers=VERSION)).json()
    theirs = (await client.get("/v1/models")).json()
    ids = [one["id"] for one in ours["data"]]
    assert ids == [RANDOM, ALIAS, SCRIPTED]
    assert [one["id"] for one in theirs["data"]] == [RANDOM, SCRIPTED]
    assert theirs["object"] == "list"
    assert (ours["has_more"], ours["first_id"], ours["last_id"]) == (False, RANDOM, SCRIPTED)
    assert ours["data"][1] == ours["data"][0] | {"id": ALIAS}
    pages = {
        "?limit=1": ([RANDOM], True),
        f"?after_id={RANDOM}": ([ALIAS, SCRIPTED], False),
        f"?before_id={SCRIPTED}&limit=1": ([ALIAS], True),
        f"?after_id={SCRIPTED}": ([], False),
    }
    for query, expected in pages.items():
        page = (await client.get(f"/v1/models{query}", headers=VERSION)).json()
        assert ([one["id"] for one in page["data"]], page["has_more"]) == expected
    for query in ("?limit=0", "?limit=many", "?after_id=none", "?after_id=a&before_id=b"):
        assert_refused(await client.get(f"/v1/models{query}", headers=VERSION), 400)
    one = await client.get(f"/v1/models/{RANDOM}", headers=VERSION)
    aliased = await client.get(f"/v1/models/{ALIAS}", headers=VERSION)
    assert one.json() == aliased.json() == ours["data"][0]
    assert "request-id" in one.headers
    absent = await client.get("/v1/models/no/such", headers=VERSION)
    assert "no/such" in assert_refused(absent, 404, "not_found_error")
    assert (await client.get("/v1/models/no/such")).json()["error"]["code"] == "model_not_found"
    assert_refused(await client.post("/v1/models", headers=VERSION), 405)


async def test_beta_queries_and_headers_change_nothing(client: httpx.AsyncClient) -> None:
    headers = VERSION | {"anthropic-beta": "oauth-2025-04-20,made-up-2030-01-01"}
    for path in (f"{MESSAGES}?beta=true", f"{COUNT}?beta=true"):
        answer = await client.post(path, json=body_of(SCRIPTED), headers=headers)
        assert answer.status_code == 200, answer.text


# refusals

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}
LINKED = {"type": "image", "source": {"type": "url", "url": "https://a.example/a.png"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}
FILE = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}


def said(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return said([{"type": "tool_result", "tool_use_id": "a", "content": content} | more])


def tool(**more: Any) -> dict[str, Any]:
    return {"tools": [WEATHER | more]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model"),
    "empty model": ({"model": ""}, "model"),
    "model of another type": ({"model": 5}, "model"),
    "no messages": ({"messages": None}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages as text": ({"messages": "Hello"}, "messages"),
    "a message as text": ({"messages": ["Hello"]}, "messages.0"),
    "no role": ({"messages": [{"content": "a"}]}, "messages.0"),
    "unknown role": (said("a", "tool"), "tool"),
    "developer": (said("a", "developer"), "developer"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "null content": (said(None), "content"),
    "number as content": (said(5), "content"),
    "object as content": (said({"type": "text", "text": "a"}), "content"),
    "nothing said": (said([]), "messages"),
    "untyped block": (said([{"text": "a"}]), "type"),
    "unknown block": (said([{"type": "sound"}]), "sound"),
    "text without text": (said([{"type": "text"}]), "text"),
    "text of another type": (said([{"type": "text", "text": ["a"]}]), "text"),
    "image": (said([IMAGE]), "text only"),
    "linked image": (said([LINKED]), "text only"),
    "image of the assistant": (said([IMAGE], "assistant"), "text only"),
    "image in a result": (result([IMAGE]), "text only"),
    "pdf": (said([PDF]), "text only"),
    "pdf in a result": (result([PDF]), "text only"),
    "file": (said([FILE]), "text only"),
    "document without source": (said([{"type": "document"}]), "source"),
    "call by the user": (said([{"type": "tool_use", "id": "a"}]), "tool_use"),
    "result by the assistant": (said([{"type": "tool_result"}], "assistant"), "tool_result"),
    "result without id": (said([{"type": "tool_result", "content": "a"}]), "tool_use_id"),
    "result of a number": (result(5), "content"),
    "is_error as text": (result("a", is_error="yes"), "is_error"),
    "call without name": (
        said([{"type": "tool_use", "id": "a", "input": {}}], "assistant"),
        "name",
    ),
    "call with text as input": (
        said([{"type": "tool_use", "id": "a", "name": "b", "input": "{}"}], "assistant"),
        "input",
    ),
    "thinking of the user": (said([{"type": "thinking", "thinking": "a"}]), "thinking"),
    "thinking without thinking": (said([{"type": "thinking"}], "assistant"), "thinking"),
    "call by the system": (said([{"type": "tool_use"}], "system"), "tool_use"),
    "bad cache_control": (
        said([{"type": "text", "text": "a", "cache_control": "ephemeral"}]),
        "cache_control",
    ),
    "system as number": ({"system": 5}, "system"),
    "system as object": ({"system": {"text": "a"}}, "system"),
    "image in the system prompt": ({"system": [IMAGE]}, "system"),
    "no max_tokens": ({"max_tokens": None}, "max_tokens"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "5"}, "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens"),
    "too hot": ({"temperature": 2.5}, "temperature"),
    "top_p above 1": ({"top_p": 1.5}, "top_p"),
    "negative top_k": ({"top_k": -1}, "top_k"),
    "stops as text": ({"stop_sequences": "a"}, "stop_sequences"),
    "a number as stop": ({"stop_sequences": [5]}, "stop_sequences"),
    "too many stops": ({"stop_sequences": ["a"] * 300}, "stop_sequences"),
    "stream as text": ({"stream": "true"}, "stream"),
    "tools as object": ({"tools": WEATHER}, "tools"),
    "tool without name": (tool(name=None), "name"),
    "tool without schema": (tool(input_schema=None), "input_schema"),
    "tool of a list": (tool(input_schema={"type": "array"}), "input_schema"),
    "schema as text": (tool(input_schema="{}"), "input_schema"),
    "unkeepable strict schema": (
        tool(input_schema={"type": "object", "properties": {"a": {"type": "nothing"}}}),
        "tools",
    ),
    "two tools of a name": ({"tools": [WEATHER, WEATHER]}, "two tools"),
    "choice without tools": ({"tool_choice": {"type": "any"}}, "no tools"),
    "choice of an unknown tool": (
        {"tool_choice": {"type": "tool", "name": "no"}, "tools": TOOLS},
        "'no'",
    ),
    "choice without name": ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "name"),
    "choice as text": ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
    "unknown choice": ({"tool_choice": {"type": "some"}, "tools": TOOLS}, "tool_choice"),
    "unknown thinking": ({"thinking": {"type": "deep"}}, "thinking"),
    "no budget": ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
    "unknown effort": ({"output_config": {"effort": "total"}}, "effort"),
    "format without schema": ({"output_config": {"format": {"type": "json_schema"}}}, "schema"),
    "unkeepable format": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        "output_config.format",
    ),
    "servers of tools": ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    "a container": ({"container": "c"}, "container"),
    "a thread": ({"thread": {"type": "create"}}, "thread"),
    "a prompt beyond the context": (said("word " * 9000), "prompt is too long"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_refused_in_anthropics_shape(
    client: httpx.AsyncClient, name: str
) -> None:
    fields, says = BAD[name]
    body = {key: value for key, value in body_of(RANDOM, **fields).items() if value is not None}
    message = assert_refused(await client.post(MESSAGES, json=body), 400, "invalid_request_error")
    assert says in message
    if "stream" not in fields:
        streamed = await client.post(MESSAGES, json=body | {"stream": True})
        assert assert_refused(streamed, 400) == message


async def test_other_refusals_have_anthropics_shape_too(client: httpx.AsyncClient) -> None:
    absent = await client.post(MESSAGES, json=body_of("absent"))
    assert "absent" in assert_refused(absent, 404, "not_found_error")
    broken = await client.post(MESSAGES, content=b'{"model": ')
    assert "JSON" in assert_refused(broken, 400, "invalid_request_error")
    listed = await client.post(COUNT, content=json.dumps([1]))
    assert "object" in assert_refused(listed, 400)
    assert_refused(await client.get(MESSAGES), 405)
    assert_refused(await client.post(f"{MESSAGES}/batches", json={}), 404, "not_found_error")
    large = await client.post(MESSAGES, content=b"x" * (2 << 20))
    assert_refused(large, 413, "request_too_large")
