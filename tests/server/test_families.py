"""Each family over HTTP: real generation ends at every one of its end-of-turn tokens."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.support.server import CHAT, HELLO, TEXT, Server, ask, chat, serving
from tests.support.tiny import build_scripted_model

SCRIPT = "Paris, of course"
ENDS = [
    ("llama", "<|end_of_text|>"),
    ("llama", "<|eot_id|>"),
    ("llama", "<|eom_id|>"),
    ("qwen", "<|im_end|>"),
    ("qwen", "<|endoftext|>"),
    ("mistral", "</s>"),
    ("gemma", "<eos>"),
    ("gemma", "<end_of_turn>"),
    ("phi", "<|end|>"),
    ("phi", "<|endoftext|>"),
    ("generic", "<|endoftext|>"),
]

CALLS = '[{"name": "look", "arguments": {"a": 1}}, {"name": "hear", "arguments": {"b": 2}}]'
TALKERS = {
    "calls": ("mistral-nemo", f"[TOOL_CALLS]{CALLS}"),
    "thinks": ("qwen3.5", "Well, let me see what it could be"),
}
"""Models whose templates are strict: one that calls twice, one that only thinks."""
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "hear")
]


def model_name(family: str, stop: str) -> str:
    return f"{family}-{''.join(filter(str.isalnum, stop))}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a model for each way to end; each is loaded by the first request for it."""
    home = tmp_path_factory.mktemp("families")
    for family, stop in ENDS:
        folder = home / "models" / model_name(family, stop)
        build_scripted_model(folder, SCRIPT, family=family, stop=stop)
    refusing = "{{ raise_exception('Nobody may speak.') }}"
    build_scripted_model(home / "models" / "refusing", SCRIPT, template=refusing)
    for name, (family, script) in TALKERS.items():
        build_scripted_model(home / "models" / name, script, family=family)
    with serving(home) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


@pytest.mark.parametrize(("family", "stop"), ENDS)
async def test_every_end_of_turn_token_of_a_family_ends_the_answer_and_is_no_part_of_it(
    client: httpx.AsyncClient, family: str, stop: str
) -> None:
    body = chat(model_name(family, stop), max_tokens=100)
    whole = await ask(client, CHAT, body)
    assert (whole.text, whole.reason) == (SCRIPT, "stop")
    streamed = await ask(client, CHAT, body | {"stream": True})
    assert (streamed.text, streamed.reason) == (SCRIPT, "stop")
    completed = await ask(client, TEXT, {"model": body["model"], "prompt": "?", "temperature": 0})
    assert (completed.text.strip(), completed.reason) == (SCRIPT, "stop")


async def test_ignore_eos_goes_on_past_the_end_of_turn(client: httpx.AsyncClient) -> None:
    body = chat(model_name("llama", "<|eot_id|>"), max_tokens=60, ignore_eos=True)
    answer = await ask(client, CHAT, body)
    assert answer.reason == "length"
    assert answer.text.startswith(SCRIPT * 2)


SYSTEM = [{"role": "system", "content": "Be brief."}, *HELLO]
TWO_USERS = [*HELLO, *HELLO]


@pytest.mark.parametrize(
    ("family", "stop", "messages"),
    [
        ("gemma", "<end_of_turn>", SYSTEM),
        ("gemma", "<end_of_turn>", TWO_USERS),
        ("mistral", "</s>", TWO_USERS),
    ],
    ids=["gemma-system", "gemma-two-users", "mistral-two-users"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_usual_conversation_is_answered_though_the_template_refuses_it(
    client: httpx.AsyncClient,
    family: str,
    stop: str,
    messages: list[dict[str, str]],
    stream: bool,
) -> None:
    body = chat(model_name(family, stop), messages=messages, stream=stream)
    assert (await ask(client, CHAT, body)).text == SCRIPT


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_what_a_template_refuses_however_it_is_put_is_a_400_that_says_why(
    client: httpx.AsyncClient, stream: bool
) -> None:
    body = chat("refusing", messages=HELLO, stream=stream)
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "Nobody may speak." in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")


async def test_calls_that_the_server_made_can_be_sent_back_with_its_ids(
    client: httpx.AsyncClient,
) -> None:
    body = chat("calls", tools=TOOLS, max_tokens=100)
    made = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]
    calls = made["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["look", "hear"]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "Fine."} for one in calls]
    again = body | {"messages": [*HELLO, made, *results]}
    assert (await client.post(CHAT, json=again)).status_code == 200


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["plain", "tools"])
async def test_an_answer_that_is_all_thinking_can_be_sent_back(
    client: httpx.AsyncClient, tools: list[dict[str, Any]]
) -> None:
    body = chat("thinks", max_tokens=3) | ({"tools": tools} if tools else {})
    made = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]
    assert made["reasoning_content"]
    assert not made["content"]
    # Client libraries put a stream without content together to null.
    for content in ("", None):
        message = made | {"content": content}
        again = body | {"messages": [*HELLO, message, {"role": "user", "content": "Go on."}]}
        assert (await client.post(CHAT, json=again)).status_code == 200
