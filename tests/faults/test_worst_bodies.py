"""The worst bodies we can think of: each is refused at once, in OpenAI's shape, and harms nobody.

Bodies are written as text, because most of them cannot be written any other way.
"""

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.server.test_errors import assert_refused
from tests.support.server import CHAT, HELLO, PLAIN, TEXT, Server, serving
from tests.support.tiny import build_tiny_model

MODEL = "sturdy"
CONTEXT = 256
PULL = "/admin/models/pull"
LOAD = f"/admin/models/{MODEL}/load"
AT_ONCE = 2.0
"""Seconds within which any of them is refused."""
MESSAGES = json.dumps(HELLO)
GOOD = {
    CHAT: {"model": MODEL, "messages": HELLO, "max_tokens": 8, "temperature": 0, "seed": 1},
    TEXT: {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "logprobs": 2},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / MODEL, context=CONTEXT)
    with serving(tmp_path_factory.mktemp("home"), "--model", str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """A client that has no patience."""
    with httpx.Client(base_url=server.url, timeout=30, **PLAIN) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def unharmed(server: Server, client: httpx.Client) -> Iterator[None]:
    """After all of them the same engine gives the same answers as before, and nothing is left."""
    before = _state(server, client)
    yield
    assert _state(server, client) == before


def _state(server: Server, client: httpx.Client) -> dict[str, Any]:
    answers = {path: client.post(path, json=body) for path, body in GOOD.items()}
    assert [answer.status_code for answer in answers.values()] == [200, 200]
    models = client.get("/admin/models").json()["models"]
    return {
        "choices": {path: answer.json()["choices"] for path, answer in answers.items()},
        "processes": {child.pid for child in server.children()},
        "models": [(model["id"], model["pid"], model["loads"]) for model in models],
        "busy": [model["running"] + model["waiting"] + model["in_flight"] for model in models],
    }


def send(client: httpx.Client, path: str, body: bytes, **headers: str) -> httpx.Response:
    """Post `body`, which must be answered at once and leave the server responsive."""
    started = time.monotonic()
    declared = {"content-type": "application/json"} | headers
    answer = client.post(path, content=body, headers=declared)
    taken = time.monotonic() - started
    assert taken < AT_ONCE, f"answered after {taken:.1f} s: {answer.status_code}"
    assert client.get("/health").status_code == 200
    return answer


def body_of(path: str, fields: str) -> bytes:
    """A good body of `path` but for `fields`, JSON text in which the last of equal keys counts."""
    needed = {
        CHAT: f'"model": "{MODEL}", "messages": {MESSAGES}, "max_tokens": 2, ',
        TEXT: f'"model": "{MODEL}", "prompt": "Hello", "max_tokens": 2, ',
        PULL: "",
    }
    # Lone surrogates and the like are in the text on purpose.
    return ("{" + needed[path] + fields + "}").encode("utf-8", "surrogatepass")


# what is no JSON object

VALID = json.dumps(GOOD[TEXT])
NOT_AN_OBJECT: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \t\r\n" * 1000,
    "a brace": b"{",
    "cut in a string": VALID[:12].encode(),
    "cut before the end": VALID[:-1].encode(),
    "cut in an escape": b'{"model": "\\u00',
    "garbage behind it": VALID.encode() + b"x",
    "two objects": VALID.encode() * 2,
    "a NUL behind it": VALID.encode() + b"\x00",
    "NULs": b"\x00" * 1000,
    "a NUL in a string": b'{"model": "a\x00b"}',
    "a line break in a string": b'{"model": "a\nb"}',
    "a comma too many": b'{"model": "m",}',
    "single quotes": b"{'model': 'm'}",
    "bare keys": b"{model: 1}",
    "a comment": b'{"model": "m" /* the model */}',
    "an unknown escape": b'{"model": "\\x41"}',
    "a number": b"1",
    "a huge number": b"9" * 1_000_000,
    "a number of huge exponent": b"1e" + b"9" * 100_000,
    "a word": b"hello",
    "NaN": b"NaN",
    "null": b"null",
    "a truth value": b"true",
    "a string": b'"model"',
    "an array": b"[]",
    "an array of the right thing": f"[{VALID}]".encode(),
    "open brackets": b"[" * 100_000,
    "nested arrays": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested arrays in a field": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-8 cut short": b'{"model": "\xf0\x9f\x98"}',
    "an overlong encoding": b'{"model": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "a code point beyond Unicode": b'{"model": "\xf4\x90\x80\x80"}',
    "a lone high surrogate": b'{"model": "\\ud800"}',
    "a lone low surrogate": b'{"model": "\\udc00 x"}',
    "a lone surrogate as key": b'{"\\ud800": 1}',
    "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + VALID.encode(),
    "UTF-16": VALID.encode("utf-16"),
    "UTF-16 without mark": VALID.encode("utf-16-le"),
    "UTF-32": VALID.encode("utf-32"),
    "EBCDIC": VALID.encode("cp500"),
    "gzip": gzip.compress(VALID.encode()),
    "a form": b"model=sturdy&prompt=hello",
    "multipart": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n',
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "MessagePack": b"\x82\xa5model\xa6sturdy\xa6prompt\xa1x",
    "a pickle": b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("path", [CHAT, TEXT, PULL, LOAD])
@pytest.mark.parametrize("name", NOT_AN_OBJECT)
def test_what_is_no_json_object_is_refused(client: httpx.Client, path: str, name: str) -> None:
    optional = path == LOAD and name in ("nothing", "null")
    answer = send(client, path, NOT_AN_OBJECT[name])
    assert answer.status_code == 200 if optional else assert_refused(answer)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-encoding": "gzip"},
        {"content-encoding": "deflate, br"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, TEXT, PULL, LOAD])
def test_what_headers_say_of_a_bad_body_makes_it_no_better(
    client: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    body = gzip.compress(VALID.encode())
    assert_refused(send(client, path, body, **headers))


# fields of the wrong type or out of range

WORDS = {
    "text": '"hot"',
    "empty text": '""',
    "number as text": '"1"',
    "truth value": "true",
    "list": "[1]",
    "empty list": "[]",
    "object": '{"a": 1}',
    "fraction": "0.5",
    "minus one": "-1",
    "2**63": str(2**63),
    "2**64": str(2**64),
    "-2**64": str(-(2**64)),
    "10**400": "1" + "0" * 400,
    "1e400": "1e400",
    "-1e400": "-1e400",
    "1e308": "1e308",
    "-1e308": "-1e308",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "nested": "[" * 150 + "]" * 150,
}
HUGE = {"2**63", "2**64", "-2**64", "10**400", "1e400", "-1e400", "1e308", "-1e308"}
NO_NUMBERS = {"NaN", "Infinity", "-Infinity"}
NOT_NUMBERS = {"text", "empty text", "number as text", "truth value", "list", "empty list"} | {
    "object",
    "nested",
}
WRONG_NUMBER = HUGE | NO_NUMBERS | NOT_NUMBERS
WRONG_INTEGER = WRONG_NUMBER | {"fraction"}
WRONG_SWITCH = set(WORDS) - {"truth value"}
WRONG_TEXT = set(WORDS) - {"text", "number as text"}

COMMON: dict[str, set[str]] = {
    "frequency_penalty": WRONG_NUMBER,
    "presence_penalty": WRONG_NUMBER,
    "repetition_penalty": WRONG_NUMBER | {"minus one"},
    "temperature": WRONG_NUMBER | {"minus one"},
    "top_p": WRONG_NUMBER | {"minus one"},
    "min_p": WRONG_NUMBER | {"minus one"},
    "top_k": WRONG_INTEGER,
    "n": WRONG_INTEGER | {"minus one"},
    "seed": WRONG_INTEGER,
    "max_tokens": WRONG_INTEGER,
    "priority": WRONG_INTEGER,
    "stream": WRONG_SWITCH,
    "ignore_eos": WRONG_SWITCH,
    "stop": WRONG_TEXT - {"empty text", "empty list"},
    "stream_options": set(WORDS) - {"object"},
    "logit_bias": set(WORDS),
    "keep_alive": (HUGE | NO_NUMBERS | NOT_NUMBERS) - {"number as text", "-2**64", "-1e308"},
    "response_format": set(WORDS),
    "structured_outputs": set(WORDS) - {"object"},
    "guided_json": set(WORDS) - {"object"},
    "guided_regex": WRONG_TEXT,
    "guided_choice": set(WORDS),
    "guided_grammar": WRONG_TEXT,
    "grammar": WRONG_TEXT - {"empty text"},
    "json_schema": set(WORDS) - {"object"},
}
WRONG: dict[str, dict[str, set[str]]] = {
    CHAT: COMMON
    | {
        "model": WRONG_TEXT - {"empty text"},
        "messages": set(WORDS),
        "max_completion_tokens": WRONG_INTEGER,
        "logprobs": WRONG_SWITCH,
        "top_logprobs": set(WORDS),
        "chat_template_kwargs": set(WORDS) - {"object"},
        "audio": set(WORDS),
        "modalities": set(WORDS),
        "prediction": set(WORDS),
        "functions": set(WORDS) - {"empty list"},
        "function_call": set(WORDS),
        "tools": set(WORDS) - {"empty list"},
        "tool_choice": set(WORDS),
        "parallel_tool_calls": WRONG_SWITCH,
        "reasoning_effort": set(WORDS),
        "thinking_budget": WRONG_INTEGER,
    },
    TEXT: COMMON
    | {
        "model": WRONG_TEXT - {"empty text"},
        "prompt": set(WORDS) - {"text", "empty text", "number as text", "list"},
        "echo": WRONG_SWITCH,
        "logprobs": WRONG_INTEGER | {"minus one"},
        "suffix": set(WORDS) - {"empty text", "empty list"},
        "best_of": set(WORDS),
    },
    PULL: {"model": WRONG_TEXT},
}
FIELDS = [(path, field) for path, fields in WRONG.items() for field in fields]


@pytest.mark.parametrize(
    ("path", "field"), FIELDS, ids=[f"{path}-{field}" for path, field in FIELDS]
)
def test_a_field_of_another_type_or_out_of_range_is_refused(
    client: httpx.Client, path: str, field: str
) -> None:
    for word in sorted(WRONG[path][field]):
        answer = send(client, path, body_of(path, f'"{field}": {WORDS[word]}'))
        assert answer.status_code == 400, (word, answer.text)
        assert_refused(answer)


# shapes

TEN_THOUSAND = range(10_000)
RECURSIVE = {"$ref": "#", "$defs": {"a": {"$ref": "#/$defs/a"}}}


def message(**fields: Any) -> dict[str, Any]:
    """The field `messages` with one message of the user, changed by `fields`."""
    return {"messages": [{"role": "user", "content": "x"} | fields]}


def part(**fields: Any) -> dict[str, Any]:
    """The same with one part."""
    return message(content=[{"type": "text", "text": "x"} | fields])


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth // 2):
        schema = {"properties": {"a": schema}}
    return schema


def tool(**fields: Any) -> dict[str, Any]:
    """A tool, changed by `fields`."""
    return {"type": "function", "function": {"name": "f"} | fields}


def called(**fields: Any) -> dict[str, Any]:
    """The fields `tools` and `tool_choice` with one tool that must be called, changed likewise."""
    return {"tools": [tool(**fields)], "tool_choice": "required"}


def freeform(grammar: str) -> dict[str, Any]:
    """The fields of a custom tool that must be called with an input of `grammar`."""
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": grammar}}
    tools = [{"type": "custom", "custom": {"name": "f", "format": form}}]
    return {"tools": tools, "tool_choice": "required"}


def laughs(word: str, levels: int) -> dict[str, Any]:
    """A schema that is of exponential size when its references are replaced by what they mean."""
    defs = {f"a{i}": {word: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": defs | {f"a{levels}": {"type": "integer"}}}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT_SHAPES: dict[str, dict[str, Any]] = {
    "an unknown role": message(role="wizard"),
    "an empty role": message(role=""),
    "a role of NULs": message(role="user\0"),
    "a role of a megabyte": message(role="u" * 1_000_000),
    "a role as list": message(role=["user"]),
    "a role as number": message(role=1),
    "no role": {"messages": [{"content": "x"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content null": message(content=None),
    "content as number": message(content=1),
    "content as truth value": message(content=True),
    "content as object": message(content={"type": "text", "text": "x"}),
    "parts of texts": message(content=["x", "y"]),
    "parts of nulls": message(content=[None]),
    "parts of parts": message(content=[[{"type": "text", "text": "x"}]]),
    "parts good and bad": message(content=[{"type": "text", "text": "x"}, {"type": "sound"}]),
    "a part without type": message(content=[{"text": "x"}]),
    "a part without text": message(content=[{"type": "text"}]),
    "a part of null": part(text=None),
    "a part of a number": part(text=1),
    "a part of a list": part(text=["x"]),
    "a part of unknown type": part(type="hologram"),
    "a part's type as list": part(type=["text"]),
    "a part's type of a megabyte": part(type="t" * 1_000_000),
    "ten thousand bad parts": message(content=[{"type": "x"} for _ in TEN_THOUSAND]),
    "a picture": part(type="image_url", image_url={"url": "http://127.0.0.1:1/a.png"}),
    "a picture as data": part(type="image_url", image_url={"url": "data:image/png;base64,AAAA"}),
    "a picture from a file": part(type="image_url", image_url={"url": "file:///etc/passwd"}),
    "a sound": part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"}),
    "a file": part(type="file", file={"file_id": "../../etc/passwd"}),
    "a tool's answer to nothing": message(role="tool"),
    "a tool's answer to null": message(role="tool", tool_call_id=None),
    "a tool's answer to a number": message(role="tool", tool_call_id=1),
    "a tool's answer to a list": message(role="tool", tool_call_id=["a"]),
    "a user's tool calls": message(tool_calls=[CALL]),
    "a tool call without id": message(role="assistant", tool_calls=[{**CALL, "id": None}]),
    "a tool call without function": message(role="assistant", tool_calls=[{"id": "a"}]),
    "a tool call of unknown type": message(role="assistant", tool_calls=[{**CALL, "type": "x"}]),
    "a tool call without name": message(
        role="assistant", tool_calls=[{**CALL, "function": {"arguments": "{}"}}]
    ),
    "a tool call's arguments as list": message(
        role="assistant", tool_calls=[{**CALL, "function": {"name": "f", "arguments": []}}]
    ),
    "tool calls as object": message(role="assistant", tool_calls=CALL),
    "a name as list": message(name=["x"]),
    "messages as object": {"messages": {"role": "user", "content": "x"}},
    "messages in messages": {"messages": [HELLO]},
    "messages of nulls": {"messages": [None, None]},
    "ten thousand messages of null": {"messages": [None for _ in TEN_THOUSAND]},
    "a good message and a bad one": {"messages": [*HELLO, {"role": "user", "content": 1}]},
    "a hundred thousand messages": {"messages": HELLO * 100_000},
    "a hundred thousand parts": message(content=[{"type": "text", "text": ""}] * 100_000),
    "a hundred thousand tool calls": message(role="assistant", tool_calls=[CALL] * 80_000),
    "as many parts as messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 100}] * 1_000
    },
    "as many messages as are looked at": {"messages": HELLO * 10_000},
    "a message of a megabyte": message(content="word " * 200_000),
    "a message of a megabyte without spaces": message(content="a" * 1_000_000),
    "a message of a megabyte of one emoji": message(content="\N{PILE OF POO}" * 250_000),
    "a message of a megabyte of combining marks": message(content="e" + "\u0301" * 500_000),
    "a message of a megabyte of NULs": message(content="\0" * 1_000_000),
    "a response in an unknown format": {"response_format": {"type": "yaml"}},
    "a response format as text": {"response_format": "json"},
    "a response format without type": {"response_format": {}},
    "a response format as list": {"response_format": [{"type": "text"}]},
    "a schema that contains itself": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": RECURSIVE},
        }
    },
    "a schema without schema": {"response_format": {"type": "json_schema"}},
    "a schema of an impossible name": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a\nb", "schema": {}}}
    },
    "tools as object": {"tools": {"type": "function"}},
    "ten thousand tools": {"tools": [tool(name=f"f{i}") for i in TEN_THOUSAND]},
    "ten thousand bad tools": {"tools": [{"type": "x"} for _ in TEN_THOUSAND]},
    "one tool too many": {"tools": [tool(name=f"f{i}") for i in range(129)]},
    "two tools of one name": {"tools": [tool(), tool()]},
    "a tool of another type": {"tools": [{"type": "web_search"}]},
    "a tool's grammar that is none": freeform("start: ("),
    "a tool's grammar without end": freeform("start: a\na: a"),
    "a tool's grammar of parentheses": freeform(f"start: {'(' * 100_000}"),
    "a tool's grammar that doubles": freeform(
        "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)), 'r60: "a"'])
    ),
    "a tool's type of a megabyte": {"tools": [{"type": "t" * 1_000_000}]},
    "a tool without name": {"tools": [tool(name=None)]},
    "a tool of an empty name": {"tools": [tool(name="")]},
    "a tool's name of a megabyte": {"tools": [tool(name="f" * 1_000_000)]},
    "a tool's name with a line break": {"tools": [tool(name="f\n")]},
    "a tool's description of a megabyte": {"tools": [tool(description="d" * 1_000_000)]},
    "a tool's parameters as list": {"tools": [tool(parameters=[])]},
    "a tool's parameters of a text": {"tools": [tool(parameters={"type": "string"})]},
    "a tool's parameters too deep": {"tools": [tool(parameters=nested(150))]},
    "a tool's parameters without end": {"tools": [tool(parameters={"enum": list(range(100_000))})]},
    "a tool's parameters that refer to nothing": called(parameters={"$ref": "#/$defs/a"}),
    "a tool's parameters that refer to themselves": called(parameters=RECURSIVE),
    "a tool's parameters that nothing matches": called(
        parameters={"properties": {"a": False}, "required": ["a"]}
    ),
    "a tool choice of nothing": {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a tool choice without tools": {"tool_choice": "required"},
    "a tool choice of another": called()
    | {"tool_choice": {"type": "function", "function": {"name": "g"}}},
    "a tool choice of a megabyte": called()
    | {"tool_choice": {"type": "function", "function": {"name": "g" * 1_000_000}}},
    "a tool choice of ten thousand": called()
    | {
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [tool() for _ in TEN_THOUSAND]},
        }
    },
    "a tool choice of none of them": called()
    | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    "a tool choice in no mode": called()
    | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [tool()]}}},
    "tools and functions": called() | {"functions": [{"name": "f"}]},
    "a function call of nothing": {"function_call": {"name": "f"}},
    "a function's answer to nothing": message(role="function"),
    "a user's function call": message(function_call={"name": "f"}),
    "another template": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    "a template that loops": {
        "chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}
    },
    "top_logprobs without logprobs": {"top_logprobs": 1},
    "top_logprobs of too many": {"logprobs": True, "top_logprobs": 21},
}
TEXT_SHAPES: dict[str, dict[str, Any]] = {
    "an empty list": {"prompt": []},
    "an empty list in a list": {"prompt": [[]]},
    "texts and tokens": {"prompt": ["a", 1]},
    "tokens and texts": {"prompt": [1, "a"]},
    "tokens and lists": {"prompt": [1, [1]]},
    "lists and texts": {"prompt": [[1], "a"]},
    "nulls": {"prompt": [None]},
    "truth values": {"prompt": [True, False]},
    "truth values in a list": {"prompt": [[True]]},
    "objects": {"prompt": [{"text": "a"}]},
    "fractions": {"prompt": [1.5, 2.5]},
    "negative tokens": {"prompt": [-1]},
    "a token beyond the vocabulary": {"prompt": [10**6]},
    "a token of 2**31": {"prompt": [2**31]},
    "a token of 2**32": {"prompt": [2**32]},
    "a token of 2**64": {"prompt": [2**64]},
    "a token of 10**400": {"prompt": [10**400]},
    "a bad token behind good ones": {"prompt": [1] * 100 + [-1]},
    "a hundred thousand tokens": {"prompt": [1] * 100_000},
    "a hundred thousand bad tokens": {"prompt": [-1] * 100_000},
    "ten thousand prompts": {"prompt": ["a"] * 10_000},
    "too many prompts times n": {"prompt": ["a"] * 200, "n": 16},
    "lists too deep": {"prompt": [[[1]]]},
    "a prompt of a megabyte": {"prompt": "word " * 200_000},
    "a prompt of a megabyte without spaces": {"prompt": "a" * 1_000_000},
    "too many logprobs": {"logprobs": 21},
}
SHARED_SHAPES: dict[str, dict[str, Any]] = {
    "a schema too deep": {"guided_json": nested(150)},
    "a schema too deep as text": {"guided_json": '{"a":' * 10_000 + "1" + "}" * 10_000},
    "a schema of a hundred thousand values": {"guided_json": {"enum": list(range(100_000))}},
    "a schema of ten thousand properties": {
        "guided_json": {"properties": {f"p{i}": {} for i in TEN_THOUSAND}}
    },
    "a schema of a megabyte": {"guided_json": {"const": "a" * 1_000_000}},
    "a schema of itself": {"guided_json": {"$ref": "#"}},
    "a schema in a circle": {"guided_json": laughs("anyOf", 3) | {"$ref": "#/$defs/none"}},
    "a schema of a file": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "a schema of a web page": {"guided_json": {"$ref": "http://127.0.0.1:1/a.json"}},
    "a schema of nothing": {"guided_json": {"enum": []}},
    "a schema of a number": {"guided_json": {"type": 1}},
    "a schema of numbers beyond all": {"guided_json": {"type": "integer", "minimum": 10**400}},
    "a schema of half an expression": {"guided_json": {"type": "string", "pattern": "("}},
    "an expression that looks ahead": {"guided_regex": "(?=a)b"},
    "an expression that looks back": {"guided_regex": "(a)\\1"},
    "an expression of a megabyte": {"guided_regex": "a" * 1_000_000},
    "an expression of a hundred thousand brackets": {"guided_regex": "(" * 100_000},
    "an expression nested ten thousand times": {"guided_regex": "(" * 10_000 + ")" * 10_000},
    "a hundred thousand choices": {"guided_choice": [str(i) for i in range(100_000)]},
    "choices of a megabyte": {"guided_choice": ["a" * 1_000_000]},
    "no choice": {"guided_choice": []},
    "an empty choice": {"guided_choice": ["a", ""]},
    "a choice of null": {"guided_choice": [None]},
    "a grammar of a megabyte": {"guided_grammar": "start: " + '"a" ' * 250_000},
    "a grammar of brackets": {"guided_grammar": "start: " + "(" * 100_000},
    "a grammar without beginning": {"guided_grammar": 'other: "a"'},
    "a grammar that leads nowhere": {"guided_grammar": "start: start"},
    "half a grammar of llama.cpp's": {"grammar": 'root ::= "a'},
    "an outer grammar": {"guided_grammar": "%import /etc/passwd"},
    "a structural tag": {"structured_outputs": {"structural_tag": "{}"}},
    "two bonds": {"guided_regex": "a", "guided_json": {}},
    "all bonds": {"structured_outputs": {"regex": "a", "choice": ["a"], "grammar": "a"}},
    "a bond without end": {"guided_regex": "a", "ignore_eos": True},
    "ten thousand stops": {"stop": [str(i) for i in TEN_THOUSAND]},
    "a stop of null": {"stop": [None]},
    "stops in stops": {"stop": [["a"]]},
    "ten thousand biases": {"logit_bias": {str(i): 1 for i in TEN_THOUSAND}},
    "a bias of a word": {"logit_bias": {"hello": 1}},
    "a bias of nothing": {"logit_bias": {"": 1}},
    "a bias of a negative token": {"logit_bias": {"-1": 1}},
    "a bias of a fraction": {"logit_bias": {"1.5": 1}},
    "a bias of Arabic digits": {"logit_bias": {"\u0661": 1}},
    "a bias of a superscript": {"logit_bias": {"²": 1}},
    "a bias of a token beyond all": {"logit_bias": {"9" * 5000: 1}},
    "a bias of a token beyond the vocabulary": {"logit_bias": {"100000": 1}},
    "a bias of true": {"logit_bias": {"1": True}},
    "a bias of null": {"logit_bias": {"1": None}},
    "a bias as text": {"logit_bias": {"1": "1"}},
    "a bias too large": {"logit_bias": {"1": 100.1}},
    "n of a thousand million": {"n": 10**9},
    "n just beyond the limit": {"n": 17},
    "temperature just beyond the limit": {"temperature": 2.0000001},
    "usage as text": {"stream": True, "stream_options": {"include_usage": "yes"}},
    "options as list": {"stream": True, "stream_options": [True]},
    "a keep_alive that is none": {"keep_alive": "soon"},
    "a keep_alive of a megabyte": {"keep_alive": "1" * 1_000_000},
    "a keep_alive beyond all time": {"keep_alive": "999999999999d"},
}
SHAPES = [
    *((CHAT, name, change) for name, change in (CHAT_SHAPES | SHARED_SHAPES).items()),
    *((TEXT, name, change) for name, change in (TEXT_SHAPES | SHARED_SHAPES).items()),
]


@pytest.mark.parametrize(
    ("path", "change"),
    [pytest.param(path, change, id=f"{path}-{name}") for path, name, change in SHAPES],
)
def test_a_shape_that_means_nothing_here_is_refused(
    client: httpx.Client, path: str, change: dict[str, Any]
) -> None:
    assert_refused(send(client, path, json.dumps(GOOD[path] | change).encode()))


# what a grammar may or may not be made of

COSTLY: dict[str, dict[str, Any]] = {
    "an expression for backtracking": {"guided_regex": "(a*)*b"},
    "an expression of alternatives": {"guided_regex": "(a|a)*(a|aa)*b"},
    "an expression of repetitions": {"guided_regex": "((a{1,100}){1,100}){1,100}"},
    "an expression that counts far": {"guided_regex": ".*a.{1000}"},
    "an expression that counts too far": {"guided_regex": "[ab]*a[ab]{100000}"},
    "an expression of all characters": {"guided_regex": r"[\s\S]{1,100000}"},
    "an expression of nothing": {"guided_regex": "[^\\s\\S]"},
    "a text of a thousand million characters": {
        "guided_json": {"type": "string", "minLength": 10**9}
    },
    "a list of a thousand million numbers": {
        "guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}
    },
    "multiples of almost nothing": {"guided_json": {"type": "number", "multipleOf": 1e-300}},
    "a pattern for backtracking": {"guided_json": {"type": "string", "pattern": "^(a+)+$"}},
    "properties of strange names": {
        "guided_json": {"properties": {"": {}, "\0": {}, '"': {}, "__proto__": {}, "é🦙": {}}}
    },
    "laughs of alternatives": {"guided_json": laughs("anyOf", 30)},
    "laughs of exclusive alternatives": {"guided_json": laughs("oneOf", 30)},
    "laughs of intersections": {"guided_json": laughs("allOf", 30)},
    "a thousand properties": {"guided_json": {"properties": {f"p{i}": {} for i in range(1000)}}},
    "ten thousand values": {"guided_json": {"enum": [f"v{i}" for i in TEN_THOUSAND]}},
    "ten thousand choices": {"guided_choice": [f"v{i}" for i in TEN_THOUSAND]},
    "a thousand alternatives": {
        "guided_json": {"anyOf": [{"properties": {f"p{i}": {}}} for i in range(1000)]}
    },
    "a grammar of a thousand rules": {
        "guided_grammar": "start: a0\n"
        + "\n".join(f"a{i}: a{i + 1} | /b/" for i in range(1000))
        + "\na1000: /c/"
    },
    "an ambiguous grammar": {"guided_grammar": "start: start start | /a/ |"},
    "a GBNF that recurs to the left": {"grammar": 'root ::= root "a" | "a"'},
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_much_to_bind_to_is_refused_or_kept_at_once(
    client: httpx.Client, path: str, name: str
) -> None:
    body = GOOD[path] | COSTLY[name] | {"max_tokens": 2}
    answer = send(client, path, json.dumps(body).encode())
    if answer.status_code != 200:
        assert_refused(answer)


# models

NAMES: dict[str, str] = {
    "a path": "/etc/passwd",
    "a path upwards": "../../../../etc/passwd",
    "an encoded path upwards": "..%2f..%2fetc%2fpasswd",
    "a dot": ".",
    "a home": "~root",
    "a file's address": "file:///etc/passwd",
    "a web address": "http://127.0.0.1:1/model",
    "a drive": "C:\\Windows\\System32",
    "a share": "\\\\127.0.0.1\\share",
    "a device": "/dev/zero",
    "a NUL": "\0",
    "a NUL behind it": f"{MODEL}\0",
    "a space behind it": f"{MODEL} ",
    "a line break behind it": f"{MODEL}\n",
    "another case": MODEL.upper(),
    "a way round": f"{MODEL}/../{MODEL}",
    "a shell command": f"{MODEL}; touch /tmp/x",
    "a template": "{{ 7 * 7 }}",
    "a format": "%s%n{0.__class__}",
    "a header": f"{MODEL}\r\nX-Injected: yes",
    "an adapter": f"{MODEL}@none",
    "an adapter upwards": f"{MODEL}@../../etc",
    "very long": "m" * 1_000_000,
    "very long and with slashes": "a/" * 100_000,
    "fullwidth letters": "\uff53\uff54\uff55\uff52\uff44\uff59",
    "right to left": "\u202eydruts",
}


@pytest.mark.parametrize("path", [CHAT, TEXT, PULL])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_model_is_refused(client: httpx.Client, path: str, name: str) -> None:
    body = body_of(path, f'"model": {json.dumps(NAMES[name])}')
    answer = send(client, path, body)
    error = assert_refused(answer, 400 if path == PULL and "://" in NAMES[name] else 404)
    assert error["param"] == "model"


IN_A_PATH = [name for name, text in NAMES.items() if len(text) < 1000 and text != "."]
"""Clients themselves resolve dots."""


@pytest.mark.parametrize("name", IN_A_PATH)
def test_a_name_that_is_no_model_is_refused_in_a_path_too(client: httpx.Client, name: str) -> None:
    place = f"/admin/models/{quote(NAMES[name], safe='')}"
    for answer in (
        send(client, f"{place}/load", b"{}"),
        send(client, f"{place}/unload", b"\xff"),
        client.delete(place),
        client.get(f"/v1/models/{quote(NAMES[name], safe='')}"),
    ):
        assert_refused(answer, 404)


# size

TOO_LARGE = 9 * 1024 * 1024


@pytest.mark.parametrize("path", [CHAT, TEXT, PULL, LOAD])
def test_a_body_beyond_the_limit_is_refused(client: httpx.Client, path: str) -> None:
    assert_refused(send(client, path, b'{"model": "' + b"m" * TOO_LARGE), 413)


# what looks bad and is not

TOLERATED: dict[str, str] = {
    "a user of a megabyte": f'"user": "{"u" * 1_000_000}"',
    "unknown fields": '"x": [[[{"y": null}]]], "": "", "\\u0000": 1',
    "ten thousand unknown fields": ", ".join(f'"x{i}": {i}' for i in TEN_THOUSAND),
    "an unknown field of 10**400": '"x": 1' + "0" * 400,
    "equal keys, of which the last counts": '"temperature": "hot", "temperature": 0',
    "a choice of tools without tools": '"tool_choice": "auto", "tools": []',
    "a format of any text": '"response_format": {"type": "text"}, "grammar": ""',
    "what only OpenAI needs": '"store": true, "metadata": [], "service_tier": 1, "verbosity": {}',
    "stream_options without stream": '"stream_options": {"include_usage": true}',
    "nulls": '"n": null, "stop": null, "stream": null, "logit_bias": null, "seed": null',
    "the smallest temperature there is": '"temperature": 5e-324, "min_p": 0.5',
    "a temperature that a float32 cannot hold": '"temperature": 1e-46, "top_p": 0.5',
    "the smallest top_p there is": '"top_p": 5e-324, "temperature": 1.5',
    "the smallest repetition penalty": '"repetition_penalty": 0.01, "min_p": 0.5',
    "all penalties at their ends": (
        '"repetition_penalty": 2, "presence_penalty": -2, "frequency_penalty": -2, "min_p": 1'
    ),
    "seeds at their ends": f'"seed": {-(2**63)}',
    "whole numbers with a point": '"n": 1.0, "top_k": 5.0, "seed": 7.0, "priority": -1e0',
    "an empty stop among others": '"stop": ["a", ""]',
    "no model": '"model": null',
    "the highest priority": f'"priority": {-(2**31) + 1}',
    "everything forbidden": '"logit_bias": '
    + json.dumps({str(i): -100 for i in range(512)})
    + ', "temperature": 2',
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("name", TOLERATED)
def test_what_looks_bad_and_is_not_is_answered(client: httpx.Client, path: str, name: str) -> None:
    answer = send(client, path, body_of(path, TOLERATED[name]))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 2
