"""One model served by two real engines: chats stay where their prefix is, and survive an end."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.server import CHAT, Answer, Server, ask, ask_through, serving, until
from tests.support.ties import same
from tests.support.tiny import build_tiny_model

CHATS = 8
SUBJECT = "Tell me what the weather will be like in the mountains near place {}, in detail. "


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)
    home = tmp_path_factory.mktemp("home")
    with serving(home, "--model", str(model), "--replicas", "2", disk_cache="off") as server:
        yield server


def turn(number: int, *said: str, tokens: int = 24) -> dict[str, Any]:
    """A chat's next turn, that looks for log-probabilities to judge a difference by."""
    texts = (SUBJECT.format(number) * 12, *said)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }


def usage(answer: Answer) -> dict[str, Any]:
    assert answer.usage is not None
    return answer.usage


def cached(answer: Answer) -> int:
    return int(usage(answer)["prompt_tokens_details"]["cached_tokens"])


async def assert_next_turns_find_their_prefix(server: Server, chats: int) -> None:
    async with server.client(timeout=60) as client:
        firsts = await asyncio.gather(*(ask(client, CHAT, turn(i)) for i in range(chats)))
        nexts = await asyncio.gather(
            *(
                ask(client, CHAT, turn(i, first.text, "And by the sea?"))
                for i, first in enumerate(firsts)
            )
        )
    for first, following in zip(firsts, nexts, strict=True):
        assert cached(following) >= usage(first)["prompt_tokens"] - 32


async def test_turns_of_chats_go_where_their_prefix_is(two: Server) -> None:
    await assert_next_turns_find_their_prefix(two, CHATS)
    replicas = (await two.idle("tiny"))["replicas"]
    assert [one["state"] for one in replicas] == ["ready", "ready"]
    assert len({one["pid"] for one in replicas}) == len(two.engines()) == 2


async def test_the_end_of_one_engine_loses_nothing(two: Server) -> None:
    asked = [turn(100 + i, tokens=100) for i in range(CHATS)]
    async with two.client(timeout=60) as client:
        expected = await asyncio.gather(*(ask(client, CHAT, body) for body in asked))
        before = (await two.idle("tiny"))["restarts"]

        async def kill() -> None:
            two.engines()[0].send_signal(signal.SIGKILL)

        answers = await ask_through(kill, client, asked)
        for answer, known in zip(answers, expected, strict=True):
            known.usage = answer.usage  # which tells what the second time was cached
            same(answer, known)

        async def whole_again() -> bool:
            status = (await two.models())["tiny"]
            ready = all(one["state"] == "ready" for one in status["replicas"])
            return ready and status["restarts"] == before + 1

        await until(whole_again, 30)
