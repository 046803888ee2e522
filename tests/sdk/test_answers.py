"""Promises about tokens, choices and scores that no model's words have a part in."""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob

from tests.sdk.conftest import MODEL
from tests.support.sdk import counts

CAPITAL = "What is the capital of France?"
COUNT = "Count from 1 to 10, comma separated."
SONG = "Write a short song about the sea."
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
SEEDED: dict[str, Any] = {"temperature": 1, "max_tokens": 16, "seed": 11}
"""Between scores of one token computed in different batches, in half precision at worst."""


async def chat(client: AsyncOpenAI, text: str, **options: Any) -> ChatCompletion:
    messages: Any = [{"role": "user", "content": text}]
    return await client.chat.completions.create(model=MODEL, messages=messages, **options)


async def stream_chat(client: AsyncOpenAI, text: str, **options: Any) -> list[ChatCompletionChunk]:
    messages: Any = [{"role": "user", "content": text}]
    stream: AsyncIterator[ChatCompletionChunk] = await client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, **options
    )
    return [chunk async for chunk in stream]


async def complete(client: AsyncOpenAI, prompt: Any, **options: Any) -> Completion:
    return await client.completions.create(model=MODEL, prompt=prompt, **options)


def said(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def texts_of(chunks: Iterable[ChatCompletionChunk]) -> dict[int, str]:
    """Each choice's text."""
    texts: defaultdict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return dict(texts)


def reasons_of(chunks: Iterable[ChatCompletionChunk]) -> dict[int, str]:
    """Each choice's reason to finish, which is told once."""
    told = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices]
    reasons = [(index, reason) for index, reason in told if reason is not None]
    assert len(reasons) == len(dict(reasons))
    return dict(reasons)


def entries_of(answer: ChatCompletion) -> list[ChatCompletionTokenLogprob]:
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    return logprobs.content


def total(logprobs: Iterable[float | None]) -> float:
    """The log-probability of a text after its first token, which has none."""
    return math.fsum(value for value in logprobs if value is not None)


# text


async def test_temperature_zero_repeats_itself_whatever_the_seed(async_client: AsyncOpenAI) -> None:
    answers = [await chat(async_client, COUNT, **GREEDY | {"max_tokens": 8}, seed=1)]
    answers += await asyncio.gather(
        *(chat(async_client, COUNT, **GREEDY | {"max_tokens": 8}, seed=seed) for seed in (2, 3))
    )
    assert len({said(answer) for answer in answers}) == 1


async def test_max_tokens_seven_is_exactly_seven_tokens_and_length(
    async_client: AsyncOpenAI,
) -> None:
    old, new, chunks, bare = await asyncio.gather(
        chat(async_client, COUNT, temperature=0, max_tokens=7),
        chat(async_client, COUNT, temperature=0, max_completion_tokens=7),
        stream_chat(
            async_client,
            COUNT,
            temperature=0,
            max_tokens=7,
            stream_options={"include_usage": True},
        ),
        complete(async_client, "One, two,", temperature=0, max_tokens=7),
    )
    for answer in (old, new, bare):
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        assert answer.choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert reasons_of(chunks) == {0: "length"}
    assert texts_of(chunks) == {0: said(old)}


# sampling


async def test_requests_without_a_seed_differ(async_client: AsyncOpenAI) -> None:
    unseeded = SEEDED | {"seed": None}
    answers = await asyncio.gather(*(chat(async_client, SONG, **unseeded) for _ in range(3)))
    assert len({said(answer) for answer in answers}) == 3


async def test_three_choices_are_three_texts_that_stream_and_add_up(
    async_client: AsyncOpenAI,
) -> None:
    options = SEEDED | {"n": 3, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    whole, chunks = await asyncio.gather(
        chat(async_client, SONG, **options),
        stream_chat(async_client, SONG, **options, stream_options={"include_usage": True}),
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) == 3
    assert texts_of(chunks) == texts
    assert reasons_of(chunks) == dict.fromkeys(range(3), "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 36
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 36
    assert counts(chunks[-1].usage) == counts(whole.usage)
    one = await chat(async_client, SONG, **options | {"n": 1, "max_tokens": 1})
    assert one.usage is not None
    assert whole.usage.prompt_tokens == one.usage.prompt_tokens


# log-probabilities


async def test_top_logprobs_come_in_order_and_number_and_lead_with_the_greedy_token(
    async_client: AsyncOpenAI,
) -> None:
    none, four = await asyncio.gather(
        chat(async_client, CAPITAL, temperature=0, max_tokens=6, logprobs=True),
        chat(async_client, CAPITAL, temperature=0, max_tokens=6, logprobs=True, top_logprobs=4),
    )
    assert all(entry.top_logprobs == [] for entry in entries_of(none))
    for entry in entries_of(four):
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) <= 1 + 1e-5
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
