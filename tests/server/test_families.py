"""Each family over HTTP: real generation ends at every one of its end-of-turn tokens."""

from collections.abc import AsyncIterator, Iterator

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


def model_name(family: str, stop: str) -> str:
    return f"{family}-{''.join(filter(str.isalnum, stop))}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a model for each way to end; each is loaded by the first request for it."""
    home = tmp_path_factory.mktemp("families")
    for family, stop in ENDS:
        folder = home / "models" / model_name(family, stop)
        build_scripted_model(folder, SCRIPT, family=family, stop=stop)
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
    ("family", "stop", "messages", "reason"),
    [
        ("gemma", "<end_of_turn>", SYSTEM, "System role not supported"),
        ("gemma", "<end_of_turn>", TWO_USERS, "must alternate"),
        ("mistral", "</s>", TWO_USERS, "must alternate"),
    ],
    ids=["gemma-system", "gemma-two-users", "mistral-two-users"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_what_a_template_refuses_is_a_400_that_says_why(
    client: httpx.AsyncClient,
    family: str,
    stop: str,
    messages: list[dict[str, str]],
    reason: str,
    stream: bool,
) -> None:
    body = chat(model_name(family, stop), messages=messages, stream=stream)
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert reason in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")


async def test_mistral_takes_a_system_message_and_alternating_turns(
    client: httpx.AsyncClient,
) -> None:
    turns = [*SYSTEM, {"role": "assistant", "content": "Hi."}, *HELLO]
    answer = await ask(client, CHAT, chat(model_name("mistral", "</s>"), messages=turns))
    assert answer.text == SCRIPT
