"""The one inference path: prompt → tokens → text events, the same for every protocol."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from mlx_server.config import Settings
from mlx_server.engine.protocol import Generate, Logprobs, Row
from mlx_server.errors import BadRequest, ContextLengthExceeded
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.stream import RowStream
from mlx_server.models.text.client import ModelText
from mlx_server.models.text.protocol import Prepared
from mlx_server.schemas.internal import (
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
)
from mlx_server.services.backpressure import Admission
from mlx_server.services.output.choices import PlainChoice, ReadChoice
from mlx_server.services.output.completion import OutputReader
from mlx_server.services.output.text import prompt_logprobs
from mlx_server.telemetry import InferenceSpan, inference_span

SEED_BITS = 64
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of a request's choices differ: the golden ratio in 64 bits."""


class InferenceService:
    """Turns internal requests into events."""

    def __init__(self, pool: ModelPoolManager, settings: Settings) -> None:
        self.pool = pool
        self._admission = Admission(settings)

    @asynccontextmanager
    async def open(self, request: InferenceRequest) -> AsyncIterator["Generation"]:
        """Render and check the prompt, hold the model, and hand the generation to the caller.

        The engine begins at once. Leaving the block aborts what still runs and lets the model go.
        Raises the errors a client should see as a status: BadRequest, ContextLengthExceeded,
        ModelNotFound, ModelLoading, ModelLoadFailed, TooManyRequests.
        """
        async with self.open_all([request]) as [generation]:
            yield generation

    @asynccontextmanager
    async def open_all(
        self, requests: Sequence[InferenceRequest]
    ) -> AsyncIterator[list["Generation"]]:
        """Do the same for several requests for one model, which begin together or not at all.

        The model is taken once: whoever held it and asked again could wait for a model that makes
        room, and that waits for them.
        """
        first = requests[0]
        arrived = asyncio.get_running_loop().time()
        async with AsyncExitStack() as stack:
            spans = [stack.enter_context(inference_span(one.model, one)) for one in requests]
            model = await stack.enter_async_context(
                self.pool.acquire(first.model, first.keep_alive)
            )
            prompts = [await _prepare(one, model) for one in requests]
            self._admission.check_queue(model, sum(one.n for one in requests))
            stack.enter_context(self._admission.timed(model.id))
            streams = []
            generations = []
            for request, prompt, span in zip(requests, prompts, spans, strict=True):
                span.model(model.id)
                wanted = _engine_requests(prompt, request, model)
                sent = model.engine.generate(wanted, request.caller.request_id)
                streams.append(stack.enter_context(sent))
                generations.append(Generation(request, model, prompt, streams[-1], span))
                stack.push_async_callback(generations[-1].settle)
            stack.enter_context(self._admission.limited(streams, arrived, model.id))
            yield generations


class Generation:
    """A request that was accepted: its prompt fits, its model is held, its engine works on it."""

    def __init__(
        self,
        request: InferenceRequest,
        model: LoadedModel,
        prompt: Prepared,
        stream: RowStream,
        span: InferenceSpan,
    ) -> None:
        self.model = model.id
        """The id under which the model is known, which may differ from the alias asked for."""
        self.prompt_tokens = len(prompt.tokens)
        self._request = request
        self._text = model.text
        self._tokens = prompt.tokens
        self._stream = stream
        self._span = span
        self._charge = request.caller.charge
        self._choices = [_choice(index, request, prompt, model.text) for index in range(request.n)]

    async def settle(self) -> None:
        """Charge the caller, once, for the tokens taken so far. Call when no more will come."""
        charge, self._charge = self._charge, None
        if charge is not None:
            completions = sum(choice.completion_tokens for choice in self._choices)
            await charge(self.prompt_tokens + completions)

    async def prompt_text(self) -> str:
        """The prompt as text, special tokens left out."""
        return await self._text.decode(self._tokens)

    async def events(self) -> AsyncIterator[list[Event]]:
        """The choices' events, interleaved as they happen, those together that came together.

        Iterate once. Raises EngineFailed when the engine fails the request or cannot survive it,
        and Unavailable or RequestTimeout when it had to be given up.
        """
        async for rows in self._stream.arrivals():
            events: list[Event] = []
            for index, row in rows:
                if row.prompt_logprobs is not None and index == 0:
                    events.append(await self._scored(row.prompt_logprobs))
                choice = self._choices[index]
                if isinstance(choice, PlainChoice):
                    events += self._told(choice.take(row), row)
                else:
                    events += self._told(await choice.take(row), row)
            if events:
                yield events
        # Before the caller hears that all has come, and may ask for more.
        await self.settle()

    async def _scored(self, logprobs: Sequence[Logprobs | None]) -> PromptScored:
        decoded = await self.prompt_text()
        entries = await asyncio.to_thread(
            prompt_logprobs, self._text, self._tokens, logprobs, decoded
        )
        return PromptScored(entries)

    def _told(self, events: list[Event], row: Row) -> list[Event]:
        """The `events` that `row` brought about, of which the span and the engine are told."""
        if row.tokens:
            self._span.first_token()
        if events and isinstance(last := events[-1], Finished):
            self._span.finished(last)
            if row.finish is None:  # it ended here, of which the engine knows nothing
                self._stream.abort(last.choice)
        return events


async def _prepare(request: InferenceRequest, model: LoadedModel) -> Prepared:
    """The prompt's tokens and what binds the completion. Raises what is wrong with the request."""
    prompt = await model.text.prepare(
        request.prompt, request.constraint, model.facts.context_length
    )
    _check(prompt.tokens, request, model)
    return prompt


def _check(tokens: list[int], request: InferenceRequest, model: LoadedModel) -> None:
    """Refuse what this model can never do."""
    context, vocabulary = model.facts.context_length, model.facts.vocab_size
    longest = model.facts.longest_sequence
    if not tokens:
        raise BadRequest("The prompt holds no token.", param="prompt")
    wanted = 1 if request.max_tokens is None else request.max_tokens
    if len(tokens) + wanted > context:
        raise ContextLengthExceeded(
            f"This model's context holds {context} tokens. You asked for {len(tokens) + wanted}: "
            f"{len(tokens)} in the prompt and at least {wanted} in the completion.",
            param="messages" if isinstance(request.prompt, ChatPrompt) else "prompt",
        )
    if len(tokens) + wanted > longest:
        raise BadRequest(
            f"{len(tokens)} tokens of prompt and {wanted} of completion can never fit: the KV "
            f"cache of {model.facts.kv_limit:,} bytes holds {longest} tokens of one request.",
            param="max_tokens",
            code="insufficient_memory",
        )
    if not all(0 <= token < vocabulary for token in tokens):
        raise BadRequest(
            f"The prompt has a token id outside this model's vocabulary of {vocabulary}.",
            param="prompt",
        )
    if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
        raise BadRequest(
            f"A token id is outside this model's vocabulary of {vocabulary}.", param="logit_bias"
        )


def _engine_requests(
    prompt: Prepared, request: InferenceRequest, model: LoadedModel
) -> list[Generate]:
    """One engine request per choice; each has a seed of its own."""
    room = model.facts.longest_sequence - len(prompt.tokens)
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    # What is complete by its grammar has nothing to go on with.
    endless = request.ignore_eos and prompt.grammar is None
    stop_tokens = [] if endless else sorted(model.text.stop_tokens)
    return [
        Generate(
            id=0,  # the client gives the real one
            prompt=prompt.tokens,
            sampling=msgspec.structs.replace(
                request.sampling, seed=(seed + index * SEED_STRIDE) % (1 << SEED_BITS)
            ),
            max_tokens=room if request.max_tokens is None else request.max_tokens,
            stop_tokens=stop_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
            grammar=prompt.grammar,
            caller=request.caller.key,
            priority=request.priority,
        )
        for index in range(request.n)
    ]


def _choice(
    index: int, request: InferenceRequest, prompt: Prepared, text: ModelText
) -> PlainChoice | ReadChoice:
    """The choice at `index`; that of a chat is read where there may be more in it than text."""
    chat = request.prompt if isinstance(request.prompt, ChatPrompt) else None
    if chat is None or (text.syntax.reasoning is None and chat.use is None):
        return PlainChoice(index, text, request.stop, len(prompt.tokens))
    reader = OutputReader(text.syntax, chat.use, thinking=prompt.thinking)
    return ReadChoice(index, text, reader, chat.use, request.stop, len(prompt.tokens))
