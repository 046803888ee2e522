"""What users of the OpenAI SDK rely on, in the words of a real model."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer

from tests.support.demo import MODEL
from tests.support.sdk import counts

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]
ON: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
ENDLESS = {"max_tokens": 4000, **ON}

EngineIsFree = Callable[[], Awaitable[None]]


# completions


async def test_completions_take_a_string_or_token_ids_or_lists_of_them(
    async_client: AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    texts = ["The capital of France is", "One, two, three,"]
    ids = [tokenizer.encode(text).ids for text in texts]
    prompts: list[Any] = [texts[0], ids[0], texts, ids]
    one, one_ids, many, many_ids = await asyncio.gather(
        *(
            async_client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5)
            for prompt in prompts
        )
    )
    assert one.choices[0].text.startswith(" Paris")
    assert [choice.text for choice in one_ids.choices] == [one.choices[0].text]
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text
    assert many.choices[1].text.startswith(" four")
    assert [choice.text for choice in many_ids.choices] == [choice.text for choice in many.choices]
    assert many.usage is not None
    assert many.usage.prompt_tokens == sum(map(len, ids))
    assert many.usage.completion_tokens == 10
    assert counts(many_ids.usage) == counts(many.usage)


async def test_a_streamed_completion_is_the_whole_completion(async_client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["The capital of France is", "One, two, three,"],
        "temperature": 0,
        "max_tokens": 6,
    }
    whole, stream = await asyncio.gather(
        async_client.completions.create(**options),
        async_client.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        ),
    )
    chunks = [chunk async for chunk in stream]
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].choices == []
    assert counts(chunks[-1].usage) == counts(whole.usage)


# conversations


async def test_a_developer_message_is_a_system_message_however_it_is_written(
    async_client: AsyncOpenAI,
) -> None:
    rule = "You always answer with the single word Banana."
    systems: list[Any] = [
        {"role": "system", "content": rule},
        {"role": "developer", "content": rule},
        {"role": "developer", "content": [{"type": "text", "text": rule}]},
    ]
    answers = await asyncio.gather(
        *(
            async_client.chat.completions.create(
                model=MODEL, messages=[system, *PARIS], temperature=0, max_tokens=6
            )
            for system in systems
        )
    )
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers if answer.usage}) == 1


async def test_an_answer_that_the_client_began_is_continued(async_client: AsyncOpenAI) -> None:
    prefill: Any = [*PARIS, {"role": "assistant", "content": "The capital of"}]
    begun, whole = await asyncio.gather(
        async_client.chat.completions.create(
            model=MODEL, messages=prefill, temperature=0, max_tokens=8
        ),
        async_client.chat.completions.create(
            model=MODEL, messages=PARIS, temperature=0, max_tokens=16
        ),
    )
    assert f"The capital of{begun.choices[0].message.content}" == whole.choices[0].message.content


def test_nulls_mean_the_defaults(client: OpenAI) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        (
            "frequency_penalty",
            "logit_bias",
            "logprobs",
            "max_completion_tokens",
            "metadata",
            "n",
            "parallel_tool_calls",
            "presence_penalty",
            "response_format",
            "seed",
            "service_tier",
            "stop",
            "store",
            "stream",
            "stream_options",
            "tool_choice",
            "tools",
            "top_logprobs",
            "top_p",
            "user",
        )
    )
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=8, **nothing
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].logprobs is None


# streams


def test_the_sdks_stream_helper_folds_our_chunks(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=16, logprobs=True
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "The capital of France is Paris."
    assert final.choices[0].finish_reason == "stop"


# leaving early


async def test_a_client_that_loses_patience_leaves_the_server_well(
    async_client: AsyncOpenAI, engine_is_free: EngineIsFree
) -> None:
    hasty = async_client.with_options(timeout=0.3)
    prompt = "The sea " * 400

    async def whole() -> None:
        await hasty.completions.create(model=MODEL, prompt=prompt, **ENDLESS)

    async def streamed() -> None:
        async for _ in await hasty.completions.create(
            model=MODEL, prompt=prompt, stream=True, **ENDLESS
        ):
            pass

    whole_end, stream_end = await asyncio.gather(whole(), streamed(), return_exceptions=True)
    assert isinstance(whole_end, openai.APITimeoutError)
    assert isinstance(stream_end, openai.APITimeoutError | httpx.TimeoutException)
    await engine_is_free()
    answer = await async_client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=8
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."


async def test_a_prediction_that_comes_true_changes_speed_and_no_text(
    async_client: AsyncOpenAI,
) -> None:
    async def answer(**more: Any) -> tuple[str | None, int]:
        said = await async_client.chat.completions.create(
            model=MODEL, messages=PARIS, temperature=0, max_tokens=24, **ON, **more
        )
        assert said.usage is not None
        assert said.usage.completion_tokens_details is not None
        accepted = said.usage.completion_tokens_details.accepted_prediction_tokens
        return said.choices[0].message.content, accepted or 0

    text, _ = await answer()
    again, accepted = await answer(prediction={"type": "content", "content": text})
    assert again == text
    assert accepted > 0
    wrong = {"type": "content", "content": "Words that never come. " * 20}
    assert (await answer(prediction=wrong))[0] == text
