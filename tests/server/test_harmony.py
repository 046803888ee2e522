"""gpt-oss over HTTP: scripted models say one message each, a random one must say several."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.server.test_tools import SCHEMAS, asking, both, whole, wild
from tests.support.server import CHAT, HELLO, Server, chat, serving
from tests.support.tiny import build_scripted_model, build_tiny_model, tiny_tokenizer

THOUGHT = "They greet me, so I greet"
GREETING = "Good day to you."
SCRIPTS = {
    "thinks": ("<|channel|>analysis<|message|>" + THOUGHT, "<|return|>"),
    "says": ("<|channel|>final<|message|>" + GREETING, "<|return|>"),
    "calls": (' to=functions.add<|channel|>analysis code<|message|>{"b": 2}', "<|call|>"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("harmony")
    build_tiny_model(home / "models" / "random", "gpt-oss", context=4096)
    for name, (script, stop) in SCRIPTS.items():
        folder = home / "models" / name
        build_scripted_model(folder, script, family="gpt-oss", stop=stop, context=4096)
    with serving(home, max_models=4) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


async def test_the_final_channel_is_the_content(client: httpx.AsyncClient) -> None:
    [choice] = (await both(client, asking("says"))).choices
    assert choice.told == (GREETING, None, [], "stop")
    assert len(choice.deltas) > 4


async def test_analysis_is_reasoning(client: httpx.AsyncClient) -> None:
    for body in (asking("thinks"), chat("thinks", max_tokens=200)):
        reply = await both(client, body)
        [choice] = reply.choices
        assert choice.told == (None, THOUGHT, [], "stop")
        assert len(choice.deltas) > 4
        assert reply.usage["completion_tokens_details"]["reasoning_tokens"] > 4


async def test_a_call_to_an_offered_tool_streams_and_another_is_thinking(
    client: httpx.AsyncClient,
) -> None:
    [choice] = (await both(client, asking("calls"))).choices
    assert choice.told == (None, None, [{"name": "add", "arguments": '{"b": 2}'}], "tool_calls")
    assert len([delta for delta in choice.deltas if delta.get("tool_calls")]) > 2
    [choice] = (await both(client, chat("calls", max_tokens=200))).choices
    assert choice.told == (None, '{"b": 2}', [], "stop")


async def test_a_begun_answer_goes_on_as_content(client: httpx.AsyncClient) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    # The script begins with marks, which within the answer are no text.
    [choice] = (await both(client, chat("says", messages=begun, max_tokens=200))).choices
    assert choice.content is not None
    assert choice.content.endswith(GREETING)


async def test_the_effort_is_part_of_the_prompt(client: httpx.AsyncClient) -> None:
    asked = [chat("says", reasoning_effort=one) for one in ("low", "medium")]
    lengths = [(await whole(client, body)).usage["prompt_tokens"] for body in asked]
    assert lengths[0] != lengths[1]


@pytest.mark.parametrize("named", [False, True], ids=["required", "named"])
async def test_a_forced_call_validates_and_is_taken_back(
    client: httpx.AsyncClient, named: bool
) -> None:
    choice = {"type": "function", "function": {"name": "forecast"}} if named else "required"
    body = wild("random", tool_choice=choice, n=2)
    reply = await both(client, body)
    for one in reply.choices:
        assert (one.reason, one.content) == ("tool_calls", None)
        [call] = one.calls
        Draft202012Validator(SCHEMAS[call["name"]]).validate(json.loads(call["arguments"]))
    said = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "Sunny"}
    again = wild("random", messages=[*HELLO, said, result], n=1, max_tokens=4)
    assert (await client.post(CHAT, json=again)).status_code == 200


async def test_a_budget_ends_the_thinking_and_a_format_binds_what_is_said(
    client: httpx.AsyncClient,
) -> None:
    final = [i for name, i in tiny_tokenizer("gpt-oss").get_vocab().items() if name.startswith("f")]
    form: dict[str, Any] = {
        "guided_choice": ["yes", "no"],
        "tools": None,
        "logit_bias": {str(token): -100 for token in final},
    }
    reply = await both(client, wild("random", **form))
    for one in reply.choices:
        assert (one.content in ("yes", "no"), one.reason, one.calls) == (True, "stop", [])
        assert one.reasoning
    unthought = wild("random", **form, reasoning_effort="none", thinking_budget=None)
    reply = await both(client, unthought)
    assert [one.reasoning for one in reply.choices] == [None] * 4
