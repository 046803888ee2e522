"""A constraint is kept or refused: a hundred schemas, the demo model, temperature 1."""

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.support.demo import MODEL
from tests.support.json_schemas import KEPT, UNKEEPABLE
from tests.support.server import CHAT

TOGETHER = 6
"""Constrained requests at a time; two that are free run beside them."""
TOKENS = 220


def asking(schema: Any, seed: int) -> dict[str, Any]:
    described = {"name": "answer", "strict": True, "schema": schema}
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Make something up. Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": described},
        "temperature": 1,
        "seed": seed,
        "max_tokens": TOKENS,
    }


async def answered(client: httpx.AsyncClient, schema: Any, seed: int) -> str:
    """How the request ended: `stop` after a valid document, `length` in the middle, or a status."""
    response = await client.post(CHAT, json=asking(schema, seed))
    if response.status_code != 200:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"].startswith("response_format"), error
        return "refused"
    [choice] = response.json()["choices"]
    if choice["finish_reason"] == "stop":
        document = json.loads(choice["message"]["content"])
        formats = Draft202012Validator.FORMAT_CHECKER
        Draft202012Validator(schema, format_checker=formats).validate(document)
    return str(choice["finish_reason"])


async def free(client: httpx.AsyncClient, stop: asyncio.Event) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}]}
    while not stop.is_set():
        response = await client.post(CHAT, json=body | {"max_tokens": 16})
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] > 0


async def outcomes(client: httpx.AsyncClient, schemas: list[Any]) -> Counter[str]:
    """How requests for `schemas` end, several at a time beside free text."""
    counted: Counter[str] = Counter()
    todo = iter(enumerate(schemas))

    async def worker() -> None:
        for number, schema in todo:
            end = await answered(client, schema, number)
            counted[end] += 1
            if end != "stop":
                print(end, json.dumps(schema)[:200])

    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(free(client, stop))
        await asyncio.gather(*(worker() for _ in range(TOGETHER)))
        stop.set()
    print(dict(counted))
    return counted


@pytest.mark.parametrize("step", [50, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
async def test_every_document_that_ends_validates_and_nothing_reasonable_is_refused(
    http: httpx.AsyncClient, step: int
) -> None:
    counted = await outcomes(http, KEPT[::step])
    assert counted["refused"] == 0
    assert counted["stop"] >= 0.9 * counted.total()


@pytest.mark.parametrize("schema", UNKEEPABLE, ids=json.dumps)
async def test_what_no_grammar_keeps_is_refused_before_a_token_is_spent(
    http: httpx.AsyncClient, schema: Any
) -> None:
    assert await answered(http, schema, 0) == "refused"
