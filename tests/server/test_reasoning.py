"""Thinking over HTTP: models of several families that think, open or closed, whole and streamed."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.test_tools import both
from tests.support.server import Server, chat, serving
from tests.support.tiny import FAMILIES, build_scripted_model

THOUGHT = "Hm, what is it"
ANSWER = "Paris, of course"


@dataclass(frozen=True)
class Thinker:
    """A scripted model that thinks: its family and markers, and how its template ends."""

    family: str
    start: str
    end: str
    tokens: bool
    """Whether the markers are tokens of their own; else they are spelled."""
    opened: bool = False
    """Whether the template opens the block."""


THINKERS = {
    "qwen": Thinker("qwen", "<think>", "</think>", tokens=True),
    "qwen-opened": Thinker("qwen", "<think>", "</think>", tokens=True, opened=True),
    "llama-spelled": Thinker("llama", "<think>", "</think>", tokens=False),
    "llama-spelled-opened": Thinker("llama", "<think>", "</think>", tokens=False, opened=True),
    "mistral": Thinker("mistral", "[THINK]", "[/THINK]", tokens=True),
    "gemma-opened": Thinker("gemma", "<think>", "</think>", tokens=True, opened=True),
    "phi": Thinker("phi", "<think>", "</think>", tokens=True),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves each thinker, and of each one that never comes to its answer."""
    home = tmp_path_factory.mktemp("thinkers")
    for name, thinker in THINKERS.items():
        begin = "" if thinker.opened else thinker.start
        build(home, name, thinker, f"{begin}{THOUGHT}.{thinker.end}{ANSWER}")
        build(home, f"{name}-endless", thinker, f"{begin}{THOUGHT}.")
    with serving(home, max_models=3) as server:
        yield server


def build(home: Path, name: str, thinker: Thinker, script: str) -> None:
    # The prompt must not end in a token of the script.
    last = f"{{{{- '{thinker.start}\\n' if add_generation_prompt else '' }}}}"
    shown = f"{{#- {thinker.start}{thinker.end} -#}}"
    template = shown + FAMILIES[thinker.family].template + (last if thinker.opened else "")
    known = FAMILIES[thinker.family].plain_tokens
    marks = [mark for mark in (thinker.start, thinker.end) if mark not in known]
    build_scripted_model(
        home / "models" / name,
        script,
        family=thinker.family,
        extra_tokens=marks if thinker.tokens else (),
        template=template,
    )


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


@pytest.mark.parametrize("model", THINKERS)
async def test_thinking_and_answer_separate_whole_and_streamed(
    client: httpx.AsyncClient, model: str
) -> None:
    reply = await both(client, chat(model, max_tokens=200))
    [choice] = reply.choices
    assert (choice.reasoning, choice.content, choice.reason) == (THOUGHT + ".", ANSWER, "stop")
    thought = reply.usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < thought < reply.usage["completion_tokens"]
    pieces = [delta for delta in choice.deltas if delta.get("reasoning_content")]
    assert len(pieces) > 1


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(one, marks=pytest.mark.soak) if one in ("gemma-opened", "phi") else one
        for one in THINKERS
    ],
)
async def test_an_answer_that_never_closes_its_thinking_is_all_thinking(
    client: httpx.AsyncClient, model: str
) -> None:
    reply = await both(client, chat(f"{model}-endless", max_tokens=200))
    [choice] = reply.choices
    assert (choice.reasoning, choice.content, choice.reason) == (THOUGHT + ".", None, "stop")
    limit = reply.usage["completion_tokens"] - 2
    [choice] = (await both(client, chat(f"{model}-endless", max_tokens=limit))).choices
    assert (choice.content, choice.reason) == (None, "length")
    assert choice.reasoning
    assert THOUGHT.startswith(choice.reasoning)


async def test_stop_strings_and_log_probabilities_are_those_of_the_answer(
    client: httpx.AsyncClient,
) -> None:
    body = chat("qwen", max_tokens=200, stop=["what", " course"], logprobs=True)
    answer = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert answer["message"]["reasoning_content"] == THOUGHT + "."
    assert answer["message"]["content"] == "Paris, of"
    entries = answer["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == b"Paris, of"
