"""What the demo model says through the official SDK: promises about text, tokens and scores."""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from tokenizers import Tokenizer

from tests.support.demo import MODEL
from tests.support.sdk import counts

CAPITAL = "What is the capital of France?"
COUNT = "Count from 1 to 10, comma separated."
SONG = "Write a short song about the sea."
EMOJI = "🎉🚀👍🏽❤️🔥"
REPEAT_EMOJI = f"Repeat this exactly: 😀{EMOJI}"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
SEEDED: dict[str, Any] = {"temperature": 1, "max_tokens": 12, "seed": 11}
REPLACEMENT = "�"
TOLERANCE = 0.02
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


async def stream_complete(client: AsyncOpenAI, prompt: Any, **options: Any) -> list[Completion]:
    stream: AsyncIterator[Completion] = await client.completions.create(
        model=MODEL, prompt=prompt, stream=True, **options
    )
    return [chunk async for chunk in stream]


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


def joined(entries: Iterable[ChatCompletionTokenLogprob]) -> bytes:
    return b"".join(bytes(entry.bytes or []) for entry in entries)


def total(logprobs: Iterable[float | None]) -> float:
    """The log-probability of a text after its first token, which has none."""
    return math.fsum(value for value in logprobs if value is not None)


# text


async def test_at_temperature_zero_the_streamed_text_is_the_whole_text_and_says_paris(
    async_client: AsyncOpenAI,
) -> None:
    whole, chunks = await asyncio.gather(
        chat(async_client, CAPITAL, **GREEDY), stream_chat(async_client, CAPITAL, **GREEDY)
    )
    assert "Paris" in said(whole)
    assert texts_of(chunks) == {0: said(whole)}
    assert reasons_of(chunks) == {0: "stop"}
    assert whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "stop"),
    [
        pytest.param(CAPITAL, "l of France is Par", id="from the middle of a token to another's"),
        pytest.param(COUNT, ", 4", id="several short tokens"),
        pytest.param(COUNT, ["5, 6", "nowhere", "3,"], id="the first of several to come"),
        pytest.param(REPEAT_EMOJI, "🚀👍", id="characters of several tokens"),
    ],
)
async def test_a_stop_string_that_spans_tokens_never_shows_nor_anything_after_it(
    async_client: AsyncOpenAI, prompt: str, stop: str | list[str]
) -> None:
    free, whole, chunks = await asyncio.gather(
        chat(async_client, prompt, **GREEDY, logprobs=True),
        chat(async_client, prompt, **GREEDY, stop=stop),
        stream_chat(async_client, prompt, **GREEDY, stop=stop),
    )
    stops = [stop] if isinstance(stop, str) else stop
    found = {one: said(free).find(one) for one in stops if one in said(free)}
    first = min(found, key=lambda one: found[one] + len(one))
    assert not any(first in entry.token for entry in entries_of(free)), "one token is no span"
    assert said(whole) == said(free)[: found[first]]
    assert texts_of(chunks) == {0: said(whole)}
    assert whole.choices[0].finish_reason == "stop"
    assert reasons_of(chunks) == {0: "stop"}
    assert whole.usage is not None
    assert free.usage is not None
    assert whole.usage.completion_tokens < free.usage.completion_tokens


async def test_a_stop_string_that_only_begins_holds_nothing_back_in_the_end(
    async_client: AsyncOpenAI,
) -> None:
    stops = ["capital of Spain", "Paris.\n", "Paris!", "is Parish"]
    free, whole, chunks = await asyncio.gather(
        chat(async_client, CAPITAL, **GREEDY),
        chat(async_client, CAPITAL, **GREEDY, stop=stops),
        stream_chat(async_client, CAPITAL, **GREEDY, stop=stops),
    )
    assert said(whole) == said(free)
    assert texts_of(chunks) == {0: said(free)}


async def test_an_emoji_answer_streams_whole_characters(async_client: AsyncOpenAI) -> None:
    options = GREEDY | {"logprobs": True}
    whole, chunks = await asyncio.gather(
        chat(async_client, REPEAT_EMOJI, **options),
        stream_chat(async_client, REPEAT_EMOJI, **options),
    )
    assert said(whole) == EMOJI
    assert len(entries_of(whole)) > len(said(whole)), "no character took several tokens"
    assert texts_of(chunks) == {0: said(whole)}
    for chunk in chunks:
        assert REPLACEMENT not in (chunk.choices[0].delta.content or "")


async def test_an_emoji_that_max_tokens_cuts_in_half_is_left_out(async_client: AsyncOpenAI) -> None:
    limits = range(1, 8)
    answers = await asyncio.gather(
        *(chat(async_client, REPEAT_EMOJI, temperature=0, max_tokens=limit) for limit in limits)
    )
    texts = [said(answer) for answer in answers]
    assert any(text == longer for text, longer in pairwise(texts)), "no limit cut a character"
    for text, longer in pairwise(texts):
        assert longer.startswith(text)
        assert EMOJI.startswith(longer)


# sampling


async def test_a_seed_gives_the_same_text_alone_and_among_seven_other_requests(
    async_client: AsyncOpenAI,
) -> None:
    alone = await chat(async_client, SONG, **SEEDED)
    busy: dict[str, Any] = {"max_tokens": 14}
    others = [
        chat(async_client, CAPITAL, temperature=0, **busy),
        chat(async_client, COUNT, temperature=0.7, top_p=0.9, **busy),
        chat(async_client, SONG, temperature=1, seed=12, **busy),
        chat(async_client, SONG, temperature=2, seed=11, extra_body={"top_k": 50}, **busy),
        chat(async_client, SONG, logprobs=True, top_logprobs=5, **busy),
        chat(async_client, SONG, frequency_penalty=1, presence_penalty=1, **busy),
        complete(async_client, "The sea", logit_bias={"30": 5}, **busy),
    ]
    among, *_ = await asyncio.gather(chat(async_client, SONG, **SEEDED), *others)
    assert said(among) == said(alone)
    assert counts(alone.usage) == counts(among.usage)


async def test_logit_bias_forces_and_forbids_a_token(
    async_client: AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    london, paris = (tokenizer.encode(word).ids for word in (" London", " Paris"))
    assert len(london) == len(paris) == 1
    prompt, options = "The capital of France is", {"temperature": 0, "max_tokens": 1}
    forced, forbidden = await asyncio.gather(
        complete(async_client, prompt, logit_bias={str(london[0]): 100}, **options),
        complete(async_client, prompt, logit_bias={str(paris[0]): -100}, **options),
    )
    assert forced.choices[0].text == " London"
    assert "Paris" not in forbidden.choices[0].text


# log-probabilities


async def test_chat_logprobs_join_back_to_the_text(async_client: AsyncOpenAI) -> None:
    options = GREEDY | {"logprobs": True, "top_logprobs": 4}
    plain, emoji, chunks = await asyncio.gather(
        chat(async_client, CAPITAL, **options),
        chat(async_client, REPEAT_EMOJI, **options),
        stream_chat(async_client, REPEAT_EMOJI, **options),
    )
    assert "".join(entry.token for entry in entries_of(plain)) == said(plain)
    for answer in (plain, emoji):
        assert joined(entries_of(answer)).decode() == said(answer)
    streamed = b""
    text = ""
    for chunk in chunks:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        if choice.logprobs:
            streamed += joined(choice.logprobs.content or [])
        assert streamed.decode() == text, "scores and text are not in step"
    assert text == said(emoji)


async def test_a_stop_string_cuts_the_scores_with_the_text(async_client: AsyncOpenAI) -> None:
    answer = await chat(async_client, COUNT, **GREEDY, stop=", 4", logprobs=True)
    assert said(answer).endswith("3")
    assert joined(entries_of(answer)).decode() == said(answer)


async def test_completion_logprobs_point_at_their_places_in_the_text(
    async_client: AsyncOpenAI,
) -> None:
    prompt = "The capital of France is"
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": 3}
    whole, echoed, chunks = await asyncio.gather(
        complete(async_client, prompt, **options),
        complete(async_client, prompt, **options, echo=True),
        stream_complete(async_client, prompt, **options, echo=True),
    )
    assert echoed.choices[0].text == prompt + whole.choices[0].text
    for answer in (whole, echoed):
        choice = answer.choices[0]
        assert choice.logprobs is not None
        tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
        assert "".join(tokens) == choice.text
        for token, offset in zip(tokens, offsets, strict=True):
            assert choice.text[offset:].startswith(token)
        for token, value, top in zip(
            tokens,
            choice.logprobs.token_logprobs or [],
            choice.logprobs.top_logprobs or [],
            strict=True,
        ):
            if value is not None:
                assert top[token] == pytest.approx(value, abs=1e-5)
                assert len(top) in (3, 4)
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    for chunk in chunks:
        for name, column in dict(chunk.choices[0].logprobs or {}).items():
            columns[name] += column
    assert echoed.choices[0].logprobs is not None
    assert columns["tokens"] == echoed.choices[0].logprobs.tokens
    assert columns["text_offset"] == echoed.choices[0].logprobs.text_offset
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text


async def test_echo_with_no_tokens_to_generate_scores_a_text_as_generating_it_would(
    async_client: AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    text = "The capital of France is Paris"
    ids = tokenizer.encode(text).ids

    async def forced(position: int) -> float:
        """The score of the token at `position`, generated after those before it."""
        answer = await complete(
            async_client,
            ids[:position],
            max_tokens=1,
            logprobs=0,
            temperature=0,
            logit_bias={str(ids[position]): 100},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == [tokenizer.decode([ids[position]])]
        return (logprobs.token_logprobs or [])[0]

    scored, generated, *singly = await asyncio.gather(
        complete(async_client, text, max_tokens=0, echo=True, logprobs=0),
        complete(
            async_client, ids[:2], max_tokens=12, temperature=0, logprobs=0, echo=True, seed=0
        ),
        *(forced(position) for position in range(1, len(ids))),
    )
    choice = scored.choices[0]
    assert choice.text == text
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert scored.usage.prompt_tokens == len(ids)
    assert choice.logprobs is not None
    scores = choice.logprobs.token_logprobs or []
    assert scores[0] is None
    assert scores[1:] == pytest.approx(singly, abs=TOLERANCE)
    assert total(scores) == pytest.approx(math.fsum(singly), abs=TOLERANCE)

    # And the other way round: what greedy decoding wrote, scored as a text.
    told = generated.choices[0].logprobs
    assert told is not None
    again = await complete(
        async_client, generated.choices[0].text, max_tokens=0, echo=True, logprobs=0
    )
    scored_again = again.choices[0].logprobs
    assert scored_again is not None
    assert scored_again.tokens == told.tokens
    assert total(scored_again.token_logprobs or []) == pytest.approx(
        total(told.token_logprobs or []), abs=TOLERANCE
    )
