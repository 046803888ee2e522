"""Bound answers, tool calls and token counts over HTTP, from a model that says anything at all."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.server.conftest import CONTEXT, MODEL
from tests.server.test_errors import assert_refused
from tests.support.server import CHAT, HELLO, TEXT, Server, stream_data

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "friend": {"anyOf": [{"type": "null"}, {"enum": ["Ann", "Bob"]}]},
    },
    "required": ["name", "age", "friend"],
    "additionalProperties": False,
}
KEEPER = {"type": "function", "function": {"name": "keep", "parameters": PERSON, "strict": True}}
CHAIN: dict[str, Any] = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"enum": [*range(10)]}, {"$ref": "#"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
TIMER = {"type": "function", "function": {"name": "wait"}}
WILD: dict[str, Any] = {"model": MODEL, "temperature": 1, "max_tokens": 200, "n": 4}
"""At this temperature a random model says every token as likely as another."""


def is_person(text: str) -> bool:
    return Draft202012Validator(PERSON).is_valid(json.loads(text))


def matches(pattern: str) -> Any:
    return lambda text: re.fullmatch(pattern, text) is not None


BOUND: dict[str, tuple[dict[str, Any], Any]] = {
    "a schema": ({"guided_json": PERSON}, is_person),
    "a format": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON},
            }
        },
        is_person,
    ),
    "a recursive schema": (
        {"guided_json": CHAIN},
        lambda text: Draft202012Validator(CHAIN).is_valid(json.loads(text)),
    ),
    "an expression": ({"guided_regex": r"[0-9]{2,4}(é|🦙)"}, matches("[0-9]{2,4}(é|🦙)")),
    "a choice": ({"guided_choice": ["yes", "no", "yes, but"]}, matches("yes(, but)?|no")),
    "Lark": ({"guided_grammar": 'start: "<" /[a-c]{3}/ ">"'}, matches("<[a-c]{3}>")),
    "GBNF": ({"grammar": 'root ::= "<" [a-c]{3} ">"'}, matches("<[a-c]{3}>")),
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("name", BOUND)
async def test_a_bound_answer_matches_whole_and_streamed(
    server: Server, path: str, name: str
) -> None:
    fields, fits = BOUND[name]
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    body = WILD | asked | fields | {"seed": 7}
    async with server.client() as client:
        answer, streamed = await asyncio.gather(
            client.post(path, json=body), texts(client, path, body)
        )
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    said = [one["message"]["content"] if path == CHAT else one["text"] for one in choices]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 4
    assert all(map(fits, said)), said
    assert streamed == said


async def texts(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[str]:
    """The texts of the choices of a stream."""
    said = [""] * body["n"]
    async for choice in streamed_choices(client, path, body):
        delta = choice["delta"].get("content") if path == CHAT else choice["text"]
        said[choice["index"]] += delta or ""
    return said


async def streamed_choices(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    """What each chunk of a stream adds to a choice."""
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for data in stream_data(response):
            if data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, ["keep", "wait"]),
        ({"tool_choice": {"type": "function", "function": {"name": "keep"}}}, ["keep"]),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "wait"}}],
                    },
                }
            },
            ["wait"],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["keep", "wait"]),
    ],
    ids=str,
)
async def test_a_call_that_must_come_comes_whole_and_streamed(
    server: Server, fields: dict[str, Any], names: list[str]
) -> None:
    asked = {"messages": HELLO, "tools": [KEEPER, TIMER], "max_tokens": 1000}
    body = WILD | asked | fields | {"seed": 3}
    async with server.client() as client:
        answer, streamed = await asyncio.gather(client.post(CHAT, json=body), calls(client, body))
    assert answer.status_code == 200, answer.text
    for index, choice in enumerate(answer.json()["choices"]):
        made = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert len({call["id"] for call in made}) == len(made) >= 1
        functions = [call["function"] for call in made]
        assert streamed[index] == functions
        for function in functions:
            assert function["name"] in names
            arguments = json.loads(function["arguments"])
            schema = PERSON if function["name"] == "keep" else {"type": "object"}
            Draft202012Validator(schema).validate(arguments)
        if fields.get("parallel_tool_calls") is False or names == ["keep"]:
            assert len(made) == 1


async def calls(client: httpx.AsyncClient, body: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The functions that the choices of a stream call, put together."""
    made: list[list[dict[str, str]]] = [[] for _ in range(body["n"])]
    async for choice in streamed_choices(client, CHAT, body):
        for call in choice["delta"].get("tool_calls", ()):
            mine = made[choice["index"]]
            if "id" in call:
                assert call["index"] == len(mine)
                mine.append(dict(call["function"]))
            else:
                mine[call["index"]]["arguments"] += call["function"]["arguments"]
    return made


async def test_functions_of_old_are_called_in_the_old_form(server: Server) -> None:
    body = WILD | {
        "messages": HELLO,
        "functions": [KEEPER["function"]],
        "function_call": {"name": "keep"},
    }
    async with server.client() as client:
        answer = await client.post(CHAT, json=body)
    for choice in answer.json()["choices"]:
        assert choice["finish_reason"] == "function_call"
        assert choice["message"].keys() == {"role", "content", "refusal", "function_call"}
        assert is_person(choice["message"]["function_call"]["arguments"])


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a schema that llguidance would not keep": (
        {"guided_json": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}},
        "guided_json",
    ),
    "a schema that nothing matches": ({"guided_json": {"allOf": [False]}}, "guided_json"),
    "a schema of an unknown type": ({"guided_json": {"type": "wizard"}}, "guided_json"),
    "a recursion without a way out": (
        {"guided_json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}},
        "guided_json",
    ),
    "a reference to nothing": ({"guided_json": {"$ref": "#/$defs/a"}}, "guided_json"),
    "a reference elsewhere": ({"guided_json": {"$ref": "http://127.0.0.1:1/a"}}, "guided_json"),
    "half an expression": ({"guided_regex": "(a"}, "guided_regex"),
    "half a grammar": ({"guided_grammar": "start: ("}, "guided_grammar"),
    "a grammar without beginning": ({"guided_grammar": 'a: "b"'}, "guided_grammar"),
    "half a grammar of llama.cpp's": ({"grammar": "root ::= ("}, "grammar"),
    "a format without schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
    ),
    "two bonds": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_kept_is_refused_before_a_token_is_spent(
    client: httpx.Client, path: str, name: str
) -> None:
    fields, param = IMPOSSIBLE[name]
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    for stream in (False, True):
        error = assert_refused(client.post(path, json=WILD | asked | fields | {"stream": stream}))
        assert error["param"] == param


def test_arguments_that_cannot_be_kept_are_refused_before_a_token_is_spent(
    client: httpx.Client,
) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
        body = WILD | {"messages": HELLO, "tools": [tool], "tool_choice": choice}
        assert "tools" in (assert_refused(client.post(CHAT, json=body))["param"] or "")


# tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [KEEPER, TIMER]},
        {"tools": [KEEPER], "tool_choice": "none"},
        {"functions": [KEEPER["function"]]},
        {"messages": [*HELLO, {"role": "assistant", "content": "Hi, I"}]},
    ],
    ids=str,
)
def test_a_conversation_has_as_many_tokens_as_its_completion_is_charged(
    client: httpx.Client, fields: dict[str, Any]
) -> None:
    body = {"model": MODEL, "messages": HELLO} | fields
    counted = client.post("/tokenize", json=body).json()
    usage = client.post(CHAT, json=body | {"max_tokens": 1}).json()["usage"]
    assert counted["count"] == len(counted["tokens"]) == usage["prompt_tokens"]
    assert counted["max_model_len"] == CONTEXT


@pytest.mark.parametrize("text", ["", "Hello, world!", "é 日本 🦙", "<|eot_id|> \n\n a"])
def test_tokens_go_back_to_their_text(client: httpx.Client, text: str) -> None:
    for name in ("prompt", "content"):
        asked = {"model": MODEL, name: text, "add_special": False}
        told = client.post("/tokenize", json=asked | {"return_token_strs": True}).json()
        pieces = client.post("/tokenize", json=asked | {"with_pieces": True}).json()["tokens"]
        assert [piece["id"] for piece in pieces] == told["tokens"]
        assert b"".join(piece_bytes(piece["piece"]) for piece in pieces).decode() == text
        assert len(told["token_strs"]) == told["count"]
        back = client.post("/detokenize", json={"model": MODEL, "tokens": told["tokens"]}).json()
        assert back["content"] == back["prompt"] == text.replace("<|eot_id|>", "")


def piece_bytes(piece: str | list[int]) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(piece)


def test_a_text_begins_as_one_for_completions_unless_told_otherwise(client: httpx.Client) -> None:
    def tokens(**fields: Any) -> list[int]:
        answer = client.post("/tokenize", json={"model": MODEL, "prompt": "Hello"} | fields)
        found: list[int] = answer.json()["tokens"]
        return found

    usage = client.post(TEXT, json={"model": MODEL, "prompt": "Hello", "max_tokens": 1}).json()
    assert len(tokens()) == usage["usage"]["prompt_tokens"]
    bare = tokens(add_special=False)
    assert tokens()[-len(bare) :] == bare
    assert len(bare) == len(tokens()) - 1
    assert tokens(add_special_tokens=False) == bare
    assert tokens(prompt="<|begin_of_text|>Hello", add_special=False) == tokens()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "tools": [{"type": "mcp"}]}, "tools.0.type"),
        ("/tokenize", {"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "word " * 100_000}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens.0"),
    ],
    ids=str,
)
def test_what_cannot_be_tokens_is_refused(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    assert assert_refused(client.post(path, json={"model": MODEL} | body))["param"] == param


def test_models_say_what_they_can_do(client: httpx.Client) -> None:
    assert client.get(f"/v1/models/{MODEL}").json()["capabilities"] == {
        "chat": True,
        "tools": True,
        "native_tools": True,
        "reasoning": False,
        "structured_output": True,
        "embeddings": False,
        "rerank": False,
    }
