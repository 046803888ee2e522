"""One request in each protocol: the same prompt, the same text, the same counts."""

import asyncio
from typing import Any

import httpx

from tests.support.demo import MODEL

SYSTEM = "Answer in one sentence."
QUESTION = "What is the capital of France?"
LIMIT = 16

Told = tuple[str, int, int]
"""Text, tokens of the prompt, tokens of the answer."""


async def asked(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(path, json={"model": MODEL, "stream": False} | body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def by_chat(http: httpx.AsyncClient) -> Told:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    body = {"messages": messages, "temperature": 0, "max_tokens": LIMIT}
    told = await asked(http, "/v1/chat/completions", body)
    usage = told["usage"]
    text = told["choices"][0]["message"]["content"]
    return text, usage["prompt_tokens"], usage["completion_tokens"]


async def by_responses(http: httpx.AsyncClient) -> Told:
    body = {"instructions": SYSTEM, "input": QUESTION, "temperature": 0}
    told = await asked(http, "/v1/responses", body | {"max_output_tokens": LIMIT, "store": False})
    usage = told["usage"]
    text = told["output"][0]["content"][0]["text"]
    return text, usage["input_tokens"], usage["output_tokens"]


async def by_messages(http: httpx.AsyncClient) -> Told:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"system": SYSTEM, "messages": messages, "temperature": 0, "max_tokens": LIMIT}
    told = await asked(http, "/v1/messages", body)
    usage = told["usage"]
    # Anthropic counts what the cache held apart.
    tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
    tokens += usage["cache_creation_input_tokens"]
    return told["content"][0]["text"], tokens, usage["output_tokens"]


async def by_ollama(http: httpx.AsyncClient) -> Told:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    options = {"temperature": 0, "num_predict": LIMIT}
    told = await asked(http, "/api/chat", {"messages": messages, "options": options})
    return told["message"]["content"], told["prompt_eval_count"], told["eval_count"]


async def test_a_request_has_the_same_text_and_usage_in_every_protocol(
    http: httpx.AsyncClient,
) -> None:
    protocols = (by_chat, by_responses, by_messages, by_ollama)
    told = await asyncio.gather(*(asked_by(http) for asked_by in protocols))
    text, prompt, answer = told[0]
    assert "Paris" in text
    assert 0 < answer <= LIMIT < prompt
    assert told == [told[0]] * 4
