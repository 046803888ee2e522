"""OpenAI's Responses over HTTP: items, streams, the store, conversations and errors."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai.types.conversations import Conversation, ConversationItemList
from openai.types.responses import ResponseItemList
from pydantic import BaseModel

from tests.server.test_errors import assert_refused
from tests.support.responses import RESPONSES, both, streamed, text_of, whole
from tests.support.server import CHAT, Server, serving
from tests.support.tiny import FAMILIES, build_scripted_model, build_tiny_model

TINY, LONG = "tiny", "long"
CONTEXT = 1024
CONVERSATIONS = "/v1/conversations"
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
SCRIPTS = {
    "acts": "<think>\nLet me see.\n</think>\n\nI shall look.\n"
    + CALL % ("mcp__look", '{"path": "a.py"}'),
    "patches": CALL % ("apply_patch", json.dumps({"input": '*** Begin\n+x "é"\n'})),
}
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
TOOLS: list[dict[str, Any]] = [
    {"type": "namespace", "name": "mcp", "description": "Files.", "tools": [LOOK]},
    {"type": "custom", "name": "apply_patch", "description": "Patches."},
    {"type": "web_search"},
    {"type": "local_shell"},
    {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:1"},
    {"type": "image_generation"},
    {"type": "file_search", "vector_store_ids": ["a"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("responses")
    build_tiny_model(home / "models" / TINY, "qwen", context=CONTEXT)
    for name, script in SCRIPTS.items():
        template = FAMILIES["qwen"].template + "{{- 'A' }}"
        build_scripted_model(home / "models" / name, script, family="qwen", template=template)
    build_tiny_model(home / "models" / LONG, "qwen", context=8192)
    with serving(home, "--model", TINY, ping_interval=0.1) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    plain = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=plain
    ) as sdk:
        yield sdk


def ask(**fields: Any) -> dict[str, Any]:
    bound = {"max_output_tokens": 8, "temperature": 0}
    return {"model": TINY, "input": "Hello"} | bound | fields


# answers


async def test_an_answer_is_thinking_text_and_a_call_of_a_group_whole_and_streamed(
    client: httpx.AsyncClient,
) -> None:
    include = ["reasoning.encrypted_content"]
    body = ask(model="acts", tools=TOOLS, include=include, max_output_tokens=200, store=False)
    response = await both(client, body)
    thinking, message, call = response["output"]
    assert thinking["content"] == [{"type": "reasoning_text", "text": "Let me see.\n"}]
    assert message["content"][0]["text"] == "I shall look."
    assert (call["type"], call["name"], call["namespace"]) == ("function_call", "look", "mcp")
    assert json.loads(call["arguments"]) == {"path": "a.py"}
    assert response["status"] == "completed"
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert_refused(await client.get(f"{RESPONSES}/{response['id']}"), 404)

    # A client that keeps nothing on the server hands all back.
    sealed = {**thinking, "content": None}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "x = 1"}
    said = [{"role": "user", "content": "Hello"}, sealed, message, call, result]
    count = f"{RESPONSES}/input_tokens"
    counts = []
    for items in (said, [said[0], thinking, *said[2:]], [said[0], *said[2:]]):
        answer = await client.post(count, json={"model": "acts", "tools": TOOLS, "input": items})
        counts.append(answer.json()["input_tokens"])
    assert counts[0] == counts[1]
    await both(client, body | {"input": said})
    changed = {**sealed, "encrypted_content": sealed["encrypted_content"][:-4] + "AAA="}
    refused = await client.post(RESPONSES, json=body | {"input": [said[0], changed]})
    assert assert_refused(refused)["code"] == "invalid_encrypted_content"
    foreign = {**sealed, "encrypted_content": "gAAAAABo"}
    assert (await client.post(RESPONSES, json=body | {"input": [*said[:1], foreign]})).is_success


async def test_thinking_is_told_as_a_summary_where_one_is_asked_for(
    client: httpx.AsyncClient,
) -> None:
    body = ask(model="acts", reasoning={"summary": "auto"}, max_output_tokens=200)
    thinking = (await both(client, body))["output"][0]
    assert thinking["summary"] == [{"type": "summary_text", "text": "Let me see.\n"}]


async def test_a_custom_tools_input_is_text_and_goes_back_as_such(
    client: httpx.AsyncClient,
) -> None:
    body = ask(model="patches", tools=TOOLS, max_output_tokens=200)
    [call] = (await both(client, body))["output"]
    assert (call["type"], call["name"]) == ("custom_tool_call", "apply_patch")
    assert call["input"] == '*** Begin\n+x "é"\n'
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "Done"}
    said = [{"role": "user", "content": "Hello"}, call, result]
    again = await both(client, body | {"input": said})
    assert again["output"][0]["input"] == call["input"]


async def test_a_custom_tools_grammar_is_kept(client: httpx.AsyncClient) -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": 'start: "+" /[a-c]{3}/ "\\n"'}
    tools = [{"type": "custom", "name": "edit", "format": form}]
    choice = {"type": "custom", "name": "edit"}
    body = ask(tools=tools, tool_choice=choice, temperature=1, seed=3, max_output_tokens=200)
    [call] = (await both(client, body | {"thinking_budget": 0}))["output"][-1:]
    assert len(call["input"]) == 5
    assert call["input"][0] == "+"


async def test_an_answer_that_the_limit_cuts_off_is_incomplete(client: httpx.AsyncClient) -> None:
    response = await both(client, ask())
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_prompt_beyond_the_context_fails_with_the_code_that_clients_act_on(
    client: httpx.AsyncClient,
) -> None:
    body = ask(input="word " * CONTEXT)
    refused = assert_refused(await client.post(RESPONSES, json=body))
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "input")
    response = await streamed(client, body)
    assert response["status"] == "failed"
    assert response["error"]["code"] == "context_length_exceeded"
    old = {"role": "user", "content": "word " * CONTEXT}
    body = ask(input=[old, {"role": "user", "content": "Hello"}], truncation="auto")
    response = await both(client, body)
    assert response["usage"]["input_tokens"] < CONTEXT


async def test_a_silent_stream_repeats_that_it_is_in_progress(client: httpx.AsyncClient) -> None:
    events: list[dict[str, Any]] = []
    await streamed(client, ask(model=LONG, input="!" * 6000), events)
    kinds = [event["type"] for event in events]
    before = kinds[: kinds.index("response.output_item.added")]
    assert before[:3] == ["response.created", *2 * ["response.in_progress"]]


async def test_the_same_request_as_a_chat_completion_gives_the_same(
    client: httpx.AsyncClient,
) -> None:
    for model, limit in ((TINY, 12), ("acts", 200)):
        chat = {
            "model": model,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
            ],
            "temperature": 0,
            "max_tokens": limit,
        }
        other = (await client.post(CHAT, json=chat)).json()
        body = ask(model=model, instructions="Be brief.", max_output_tokens=limit)
        response = await both(client, body)
        assert text_of(response) == (other["choices"][0]["message"]["content"] or "")
        usage, told = response["usage"], other["usage"]
        assert usage["input_tokens"] == told["prompt_tokens"]
        assert usage["output_tokens"] == told["completion_tokens"]


# the SDK's helpers


class Verdict(BaseModel):
    fine: bool


def test_the_sdk_parses_streams_and_converses(sdk: openai.OpenAI) -> None:
    parsed = sdk.responses.parse(
        model=TINY, input="Fine?", text_format=Verdict, extra_body={"thinking_budget": 0}
    )
    assert isinstance(parsed.output_parsed, Verdict)
    with sdk.responses.stream(model="acts", input="Hello") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert final.status == "completed"
    assert sdk.responses.retrieve(final.id).output_text == final.output_text
    assert [item.type for item in sdk.responses.input_items.list(final.id)] == ["message"]
    counted = sdk.responses.input_tokens.count(model="acts", input="Hello")
    assert final.usage is not None
    assert counted.input_tokens == final.usage.input_tokens
    with pytest.raises(openai.BadRequestError):
        sdk.responses.cancel(final.id)

    conversation = sdk.conversations.create(metadata={"a": "b"})
    sdk.conversations.items.create(
        conversation.id, items=[{"role": "user", "content": "I am Ada."}]
    )
    sdk.responses.create(
        model=TINY, input="Who am I?", conversation=conversation.id, max_output_tokens=4
    )
    items = list(sdk.conversations.items.list(conversation.id, order="asc", limit=2))
    assert [getattr(item, "role", None) for item in items] == ["user", "user", "assistant"]
    first = items[0].id
    assert first is not None
    assert sdk.conversations.items.retrieve(first, conversation_id=conversation.id).id == first
    sdk.conversations.items.delete(first, conversation_id=conversation.id)
    assert len(list(sdk.conversations.items.list(conversation.id))) == 2
    assert sdk.conversations.update(conversation.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert sdk.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.conversations.retrieve(conversation.id)


# the store


async def test_a_response_that_was_deleted_is_gone(client: httpx.AsyncClient) -> None:
    first = await whole(client, ask())
    second = await whole(client, ask(previous_response_id=first["id"]))
    listed = (await client.get(f"{RESPONSES}/{first['id']}/input_items")).json()
    ResponseItemList.model_validate(listed)
    assert (await client.get(f"{RESPONSES}/{second['id']}")).json() == second
    assert (await client.delete(f"{RESPONSES}/{first['id']}")).json()["deleted"]
    assert_refused(await client.get(f"{RESPONSES}/{first['id']}"), 404)
    for gone in (first, second):
        refused = await client.post(RESPONSES, json=ask(previous_response_id=gone["id"]))
        assert assert_refused(refused)["code"] == "previous_response_not_found"


async def test_items_may_be_referred_to_by_their_names(client: httpx.AsyncClient) -> None:
    first = await whole(client, ask())
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    said = [{"role": "user", "content": "Hello"}, reference, {"role": "user", "content": "And?"}]
    referred = await whole(client, ask(input=said))
    told = await whole(client, ask(input=[said[0], first["output"][0], said[2]]))
    assert text_of(referred) == text_of(told)


async def test_two_writers_at_once_lose_nothing(client: httpx.AsyncClient) -> None:
    conversation = (await client.post(CONVERSATIONS, json={})).json()
    Conversation.model_validate(conversation)
    bodies = [ask(input=f"{n}", conversation={"id": conversation["id"]}) for n in range(8)]
    responses = await asyncio.gather(*(whole(client, body) for body in bodies))
    items: list[dict[str, Any]] = []
    path = f"{CONVERSATIONS}/{conversation['id']}/items"
    listed = (await client.get(path, params={"limit": 100, "order": "asc"})).json()
    ConversationItemList.model_validate(listed)
    items = listed["data"]
    asked = [one["content"][0]["text"] for one in items if one["role"] == "user"]
    assert sorted(asked) == [f"{n}" for n in range(8)]
    said = {one["output"][-1]["id"] for one in responses}
    assert said <= {one["id"] for one in items}


async def test_a_full_disk_loses_no_answer(server: Server, client: httpx.AsyncClient) -> None:
    front = psutil.Process(server.process.pid)
    before = front.rlimit(psutil.RLIMIT_FSIZE)
    # Files that are as large already can no longer grow.
    front.rlimit(psutil.RLIMIT_FSIZE, (1024, before[1]))
    try:
        response = await both(client, ask(input="Hello " * 100))
        assert response["store"] is False
        assert text_of(response)
        refused = await client.post(CONVERSATIONS, json={})
        assert assert_refused(refused, 503)["code"] == "storage_failed"
    finally:
        front.rlimit(psutil.RLIMIT_FSIZE, before)
    assert_refused(await client.get(f"{RESPONSES}/{response['id']}"), 404)
    assert (await whole(client, ask()))["store"] is True


async def test_twelve_turns_read_each_new_turn_alone_and_outlive_a_restart_and_a_kill(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("turns")
    # Its answers are cut into the same tokens when they are read.
    build_scripted_model(home / "models" / TINY, "By me.", context=4096)
    previous: str | None = None
    length = 0
    block = 32
    for part in range(2):
        with serving(home, "--model", TINY) as server:
            async with server.client() as client:
                for turn in range(6):
                    said = f"Turn {part * 6 + turn}: what shall be done next, and by whom?"
                    body = ask(input=said, previous_response_id=previous)
                    response = await whole(client, body)
                    usage = response["usage"]
                    cached = usage["input_tokens_details"]["cached_tokens"]
                    assert usage["input_tokens"] > length
                    print(f"turn {part * 6 + turn}: {cached} of {usage['input_tokens']} cached")
                    # What was never written to the disk is lost with an engine that is killed.
                    if turn != 4:
                        assert cached > length - block
                    previous = response["id"]
                    length = usage["input_tokens"] + usage["output_tokens"]
                    if turn == 3:
                        [engine] = server.engines()
                        engine.kill()
                assert (await client.get(f"{RESPONSES}/{previous}")).json() == response


# bad input


def group(name: Any, size: int, function: str = "f") -> dict[str, Any]:
    tools = [LOOK | {"name": f"{function}{n}"} for n in range(size)]
    return {"type": "namespace", "name": str(name), "description": "", "tools": tools}


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"input": 1}, "input"),
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": {"role": "user"}}, "input"),
    ({"input": ["a"]}, "input.0"),
    ({"input": [{}]}, "input.0"),
    ({"input": [{"role": "user"}]}, "input.0"),
    ({"input": [{"content": "a"}]}, "input.0"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": 1}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0"),
    ({"input": [{"type": "nothing"}]}, "input.0"),
    ({"input": [{"type": 1}]}, "input.0.type"),
    ({"input": [{"type": "function_call"}]}, "input.0"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input.0"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input.0"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input.0"),
    ({"input": [{"type": "custom_tool_call", "call_id": "a", "name": "f"}]}, "input.0"),
    ({"input": [{"type": "custom_tool_call_output", "call_id": "a"}]}, "input.0"),
    ({"input": [{"type": "item_reference"}]}, "input.0"),
    ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input"),
    ({"input": [{"role": "user", "content": "a"}] * 10_001}, "input"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input"),
    ({"instructions": 1}, "instructions"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ({"previous_response_id": ""}, "previous_response_id"),
    ({"previous_response_id": "a" * 1000}, "previous_response_id"),
    ({"previous_response_id": "a", "conversation": "b"}, "conversation"),
    ({"conversation": {}}, "conversation.id"),
    ({"conversation": 1}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_a"}}, "prompt"),
    ({"moderation": {"model": "a"}}, "moderation"),
    ({"n": 2}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"store": "yes"}, "store"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"max_output_tokens": "8"}, "max_output_tokens"),
    ({"max_tool_calls": -1}, "max_tool_calls"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"truncation": "some"}, "truncation"),
    ({"include": "all"}, "include"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a"),
    ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "some"}}, "reasoning.summary"),
    ({"text": {"verbosity": "some"}}, "text.verbosity"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": 1}}}}, None),
    ({"tools": [{"type": "nothing"}]}, "tools.0"),
    ({"tools": [{}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [{"type": "custom", "name": "a", "format": {"type": "grammar"}}]}, None),
    ({"tools": [{"type": "namespace", "name": "a", "tools": []}]}, "tools.0.tools"),
    ({"tools": [LOOK, LOOK]}, "tools"),
    ({"tools": [LOOK] * 129}, "tools"),
    ({"tools": [group(n, 100) for n in range(2)]}, "tools"),
    ({"tools": [group("g" * 200, 1, "f" * 200)]}, "tools"),
    ({"tool_choice": "some"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}, "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "none"}, "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, None),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ({"prompt_cache_key": 1}, "prompt_cache_key"),
    ({"user": 1}, "user"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda one: str(one)[:60])
async def test_bad_input_is_refused_in_openais_shape(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    error = assert_refused(await client.post(RESPONSES, json=ask() | fields))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"{RESPONSES}/resp_none", 404),
        ("DELETE", f"{RESPONSES}/resp_none", 404),
        ("POST", f"{RESPONSES}/resp_none/cancel", 404),
        ("GET", f"{RESPONSES}/resp_none/input_items", 404),
        ("GET", f"{RESPONSES}/resp_none?stream=true", 400),
        ("GET", f"{CONVERSATIONS}/conv_none", 404),
        ("DELETE", f"{CONVERSATIONS}/conv_none", 404),
        ("GET", f"{CONVERSATIONS}/conv_none/items", 404),
        ("GET", f"{CONVERSATIONS}/conv_none/items/msg_none", 404),
        ("DELETE", f"{CONVERSATIONS}/conv_none/items/msg_none", 404),
        ("PUT", RESPONSES, 405),
        ("GET", f"{RESPONSES}/a/b/c", 404),
    ],
)
async def test_what_is_not_there_is_told(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    assert_refused(await client.request(method, path), status)
