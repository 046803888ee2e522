"""A request's text is the same however much of its prompt was cached and whoever is beside it.

The demo model in float32. A sum may come out a rounding differently in another batch. So where two
tokens are equally good to about three digits, or a draw falls on the boundary between them, either
may come; that is looked into, and counted.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.demo import MODEL
from tests.support.server import CHAT, serving

SYSTEM = (
    "You are the assistant of a small travel agency in the mountains. Answer in a few friendly "
    "sentences, name one place that is worth the way, and say how to get there without a car. "
    "If a question has nothing to do with travelling, say so and propose a walk instead. "
)
QUESTIONS = [
    "Where can I swim?",
    "What is the best month for hiking?",
    "My children are bored. What now?",
    "Is there a train to the glacier?",
    "What do people eat there?",
    "How do I fix a bicycle?",
    "Which lake is the warmest?",
    "Tell me about the old bridge.",
]
NEAR = 1e-3
"""How close the log-probabilities of two tokens must be for either to be right."""


def requests(count: int) -> list[dict[str, Any]]:
    """Chats that begin alike, half of them greedy and half seeded; two ask the same."""
    generator = random.Random(5)
    bodies = []
    for number in range(count):
        sampling: dict[str, Any] = {"temperature": 0}
        if number % 2:
            filters = {"top_p": generator.choice([1, 0.9]), "top_k": generator.choice([0, 40])}
            sampling = {"temperature": 0.8, "seed": number, **filters}
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTIONS[number // 2]},
        ]
        bodies.append({"model": MODEL, "messages": messages, "max_tokens": 24} | sampling)
    return bodies


def home_with(models: Path, home: Path) -> Path:
    """A home of its own with the models of another."""
    home.mkdir()
    (home / "models").symlink_to(models, target_is_directory=True)
    return home


@asynccontextmanager
async def demo(home: Path, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    with serving(home, "--model", MODEL, **settings) as server:
        async with server.client() as client:
            yield client


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> "Said":
    answer = await client.post(CHAT, json=body | {"logprobs": True, "top_logprobs": 5})
    assert answer.status_code == 200, answer.text
    return Said(answer.json())


class Said:
    """An answer: its tokens with what they and their rivals scored, and what was cached."""

    def __init__(self, answer: dict[str, Any]) -> None:
        [choice] = answer["choices"]
        self.text: str = choice["message"]["content"]
        self.entries: list[dict[str, Any]] = choice["logprobs"]["content"]
        self.cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def parts_at_a_near_tie(self, other: "Said") -> bool:
        """Whether the first token in which the two differ was as good as the other's."""
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if mine["token"] != theirs["token"]:
                scores = {entry["token"]: entry["logprob"] for entry in mine["top_logprobs"]}
                rival = scores.get(theirs["token"])
                return rival is not None and abs(rival - mine["logprob"]) < NEAR
        return False


@pytest.mark.soak
async def test_text_does_not_depend_on_the_cache_or_the_batch(
    demo_model: Path, tmp_path: Path
) -> None:
    bodies = requests(16)
    plain, caching = (home_with(demo_model.parent, tmp_path / name) for name in ("a", "b"))
    async with demo(plain, prefix_cache="0") as client:
        alone = [await ask(client, body) for body in bodies]
        batch = await asyncio.gather(*(ask(client, body) for body in bodies))
    async with demo(caching) as client:
        cold = await asyncio.gather(*(ask(client, body) for body in bodies))
        warm = [await ask(client, body) for body in bodies]
        warm_batch = await asyncio.gather(*(ask(client, body) for body in bodies))
    async with demo(caching) as client:
        disk = await asyncio.gather(*(ask(client, body) for body in bodies))
    assert all(said.cached == 0 for said in (*alone, *batch))
    assert all(said.cached > 60 for said in (*warm, *warm_batch, *disk))
    ways = {"batch": batch, "cold": cold, "warm": warm, "warm batch": warm_batch, "disk": disk}
    differing = [
        (name, number)
        for name, answers in ways.items()
        for number, said in enumerate(answers)
        if said.text != alone[number].text
    ]
    print(f"{len(differing)} of {len(ways) * len(bodies)} answers differ: {differing}")
    for name, number in differing:
        if bodies[number]["temperature"] > 0:
            continue
        assert alone[number].parts_at_a_near_tie(ways[name][number]), (name, number)
    assert len(differing) <= 2
