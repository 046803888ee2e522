"""The one inference path: prompt → tokens → text events, the same for every protocol."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import msgspec

from mlx_server.config import Settings
from mlx_server.engine.client import RowStream
from mlx_server.engine.protocol import FinishReason, Generate, Logprobs, Row
from mlx_server.errors import (
    BadRequest,
    ContextLengthExceeded,
    RequestTimeout,
    TooManyRequests,
    Unavailable,
)
from mlx_server.models.pool import ModelPoolManager
from mlx_server.models.slot import LoadedModel
from mlx_server.schemas.internal import (
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
    TextDelta,
    Usage,
)
from mlx_server.services.text import AlignedText, TokenTexts, prompt_logprobs
from mlx_server.telemetry import InferenceSpan, inference_span

SEED_BITS = 64
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of a request's choices differ: the golden ratio in 64 bits."""
SHORTEST_RETRY = 1.0
LONGEST_RETRY = 60.0
"""Seconds between which a client is told to wait when a model's queue is full."""
NEWEST_WEIGHT = 0.1
"""Of the latest request in the average of how long requests take."""


class InferenceService:
    """Turns internal requests into events."""

    def __init__(self, pool: ModelPoolManager, settings: Settings) -> None:
        self.pool = pool
        self.settings = settings
        self._usual_seconds: dict[str, float] = {}

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
            self._check_queue(model, sum(one.n for one in requests))
            stack.enter_context(self._timed(model.id))
            streams = []
            generations = []
            for request, tokens, span in zip(requests, prompts, spans, strict=True):
                span.model(model.id)
                wanted = _engine_requests(tokens, request, model)
                sent = model.engine.generate(wanted, request.caller.request_id)
                streams.append(stack.enter_context(sent))
                generations.append(Generation(request, model, tokens, streams[-1], span))
                stack.push_async_callback(generations[-1].settle)
            stack.enter_context(self._limited(streams, arrived, model.id))
            yield generations

    def _check_queue(self, model: LoadedModel, new: int) -> None:
        """Refuse `new` sequences that find no place in the batch nor in the queue before it."""
        places = self.settings.max_batch + self.settings.max_queue
        if new > places:
            raise BadRequest(
                f"You asked for {new} completions at once; this server takes {places}.",
                code="too_many_completions",
            )
        lacking = model.engine.in_flight + new - places
        if lacking > 0:
            usual = self._usual_seconds.get(model.id, 0.0)
            wait = usual * lacking / self.settings.max_batch
            raise TooManyRequests(
                f"The queue of the model `{model.id}` is full: {model.engine.in_flight} "
                f"completions run or wait, and there are {places} places.",
                retry_after=_bounded(wait),
            )

    @contextmanager
    def _limited(
        self, streams: Sequence[RowStream], arrived: float, model_id: str
    ) -> Iterator[None]:
        """End `streams` when none of them begins in time, or when all takes too long.

        `arrived` is the event loop's time. Timers cost nothing per token, and work while nobody
        reads.
        """
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self.settings.queue_timeout, self._end_unbegun, streams, model_id),
            loop.call_at(arrived + self.settings.request_timeout, self._end_overdue, streams),
        ]
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    def _end_unbegun(self, streams: Sequence[RowStream], model_id: str) -> None:
        if any(stream.begun for stream in streams):
            return
        error = Unavailable(
            f"The model `{model_id}` had no place for this request within "
            f"{self.settings.queue_timeout:g} seconds.",
            code="queue_timeout",
            retry_after=_bounded(self._usual_seconds.get(model_id, 0.0)),
        )
        for stream in streams:
            stream.fail(error)

    def _end_overdue(self, streams: Sequence[RowStream]) -> None:
        error = RequestTimeout(
            f"The request was not finished within {self.settings.request_timeout:g} seconds."
        )
        for stream in streams:
            stream.fail(error)

    @contextmanager
    def _timed(self, model_id: str) -> Iterator[None]:
        """Learn how long the requests of a model take."""
        started = time.monotonic()
        try:
            yield
        finally:
            taken = time.monotonic() - started
            usual = self._usual_seconds.get(model_id, taken)
            self._usual_seconds[model_id] = usual + NEWEST_WEIGHT * (taken - usual)


class Generation:
    """A request that was accepted: its prompt fits, its model is held, its engine works on it."""

    def __init__(
        self,
        request: InferenceRequest,
        model: LoadedModel,
        tokens: list[int],
        stream: RowStream,
        span: InferenceSpan,
    ) -> None:
        self.model = model.id
        """The id under which the model is known, which may differ from the alias asked for."""
        self.prompt_tokens = len(tokens)
        self._request = request
        self._text = model.text
        self._tokens = tokens
        self._stream = stream
        self._span = span
        self._choices = [
            _Choice(index, self._text, request.stop, self.prompt_tokens)
            for index in range(request.n)
        ]

    async def settle(self) -> None:
        """Charge the caller for the tokens taken so far. Call once, when no more will come."""
        charge = self._request.caller.charge
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
                events += self._taken(self._choices[index], row)
            if events:
                yield events

    async def _scored(self, logprobs: Sequence[Logprobs | None]) -> PromptScored:
        decoded = await self.prompt_text()
        entries = await asyncio.to_thread(
            prompt_logprobs, self._text, self._tokens, logprobs, decoded
        )
        return PromptScored(entries)

    def _taken(self, choice: "_Choice", row: Row) -> Sequence[Event]:
        """The events that `row` brings about, of which the span and the engine are told."""
        if row.tokens:
            self._span.first_token()
        events = choice.take(row)
        if events and isinstance(last := events[-1], Finished):
            self._span.finished(last)
            if row.finish is None:  # a stop string, of which the engine knows nothing
                self._stream.abort(choice.index)
        return events


class _Choice:
    """One choice's way from rows to events."""

    def __init__(
        self, index: int, texts: TokenTexts, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self.index = index
        self.text = AlignedText(texts, stops)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0

    def take(self, row: Row) -> list[TextDelta | Finished]:
        """The events that `row` brings about; none follow a `Finished`, which is the last."""
        events: list[TextDelta | Finished] = []
        self.cached_tokens = row.cached or self.cached_tokens
        # A stop token ends the text and is no part of it.
        spoken = len(row.tokens) - (row.finish == "stop")
        for position, token in enumerate(row.tokens):
            self.completion_tokens += 1
            if position >= spoken:
                break
            text, entries = self.text.push(token, row.logprobs[position] if row.logprobs else None)
            if text or entries:
                events.append(TextDelta(self.index, text, entries))
            if self.text.stopped:
                events.append(self._finished("stop"))
                return events
        if row.finish is not None:
            text, entries = self.text.finish()
            if text or entries:
                events.append(TextDelta(self.index, text, entries))
            events.append(self._finished(row.finish))
        return events

    def _finished(self, reason: FinishReason) -> Finished:
        usage = Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
        return Finished(self.index, reason, usage)


def _bounded(seconds: float) -> float:
    """When a client is told to come back, if so many seconds are expected."""
    return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)


async def _prepare(request: InferenceRequest, model: LoadedModel) -> list[int]:
    """The prompt's tokens. Raises what is wrong with the request."""
    tokens = await model.text.tokenize(request.prompt, model.facts.context_length)
    _check(tokens, request, model)
    return tokens


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
    tokens: list[int], request: InferenceRequest, model: LoadedModel
) -> list[Generate]:
    """One engine request per choice; each has a seed of its own."""
    room = model.facts.longest_sequence - len(tokens)
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    stop_tokens = [] if request.ignore_eos else sorted(model.text.stop_tokens)
    return [
        Generate(
            id=0,  # the client gives the real one
            prompt=tokens,
            sampling=msgspec.structs.replace(
                request.sampling, seed=(seed + index * SEED_STRIDE) % (1 << SEED_BITS)
            ),
            max_tokens=room if request.max_tokens is None else request.max_tokens,
            stop_tokens=stop_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
            caller=request.caller.key,
            priority=request.priority,
        )
        for index in range(request.n)
    ]
