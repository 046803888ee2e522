"""Answers generations independently of the protocol: run, count, fold or stream events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.responses import Response

from mlx_server.api.http.streaming import StreamedAnswer, WholeAnswer
from mlx_server.api.http.wire import Failure, StreamEvent
from mlx_server.errors import ServerError
from mlx_server.schemas.internal import (
    Event,
    Finished,
    InferenceRequest,
    Usage,
)
from mlx_server.services.inference import Generation, InferenceService
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.watch import Watch

MERGE_BUFFER = 64

IndexedEvents = tuple[int, list[Event]]
Opened = tuple[Sequence[Generation], AsyncIterator[IndexedEvents]]


@dataclass(frozen=True, slots=True)
class Accepted:
    model: str
    """Its id, never an alias."""
    prompts: tuple[str, ...] = ()
    prompt_tokens: int = 0
    """Of all prompts."""


class AnswerFormat(Protocol):
    def feed(self, prompt: int, event: Event) -> object: ...

    def body(self, usage: Usage) -> bytes: ...


class StreamFormat(Protocol):
    def begin(self) -> Sequence[StreamEvent]: ...

    def feed(self, prompt: int, event: Event) -> Sequence[StreamEvent]: ...

    def idle(self) -> StreamEvent:
        """One that says nothing."""
        ...

    def end(self, usage: Usage) -> Sequence[StreamEvent]: ...


@dataclass(frozen=True, slots=True)
class AnswerFormats:
    answer: Callable[[Accepted], AnswerFormat]
    stream: Callable[[Accepted], StreamFormat]
    echo: bool = False
    keep: Callable[[Usage], Awaitable[None]] | None = None
    """Awaited once all events were fed, before the answer ends."""
    failed: Callable[[Failure], StreamEvent] | None = None
    """A stream's last event where one broke; else the wire's."""
    refused: Callable[[ServerError], Sequence[StreamEvent] | None] | None = None
    """A whole stream for an error that kept it from opening; None: an ordinary answer."""


@dataclass(slots=True)
class Generator:
    service: InferenceService
    metrics: Metrics
    requests: Sequence[InferenceRequest]
    formats: AnswerFormats
    stream_format: StreamFormat = field(init=False)
    """Once the stream is open."""

    def answer(self) -> Response:
        return WholeAnswer(self._whole)

    def stream(self) -> Response:
        return StreamedAnswer(
            self._batches(),
            idle=lambda: self.stream_format.idle(),
            failed=self.formats.failed,
        )

    async def _whole(self) -> bytes:
        async with self._opened(streams=False) as (generations, events):
            answer = self.formats.answer(await self._accepted(generations))
            tally = Tally()
            async for prompt, together in events:
                for event in together:
                    tally.feed(prompt, event)
                    answer.feed(prompt, event)
            return answer.body(await self._ended(tally))

    @asynccontextmanager
    async def _batches(self) -> AsyncIterator[AsyncIterator[Sequence[StreamEvent]]]:
        async with AsyncExitStack() as stack:
            try:
                generations, events = await stack.enter_async_context(self._opened(streams=True))
                self.stream_format = self.formats.stream(await self._accepted(generations))
                batches = self._formatted(events, self.stream_format)
            except ServerError as error:
                refusal = self.formats.refused and self.formats.refused(error)
                if refusal is None:
                    raise
                batches = _alone(refusal)
            yield await stack.enter_async_context(aclosing(batches))

    async def _formatted(
        self, events: AsyncIterator[IndexedEvents], stream: StreamFormat
    ) -> AsyncGenerator[Sequence[StreamEvent], None]:
        tally = Tally()
        yield stream.begin()
        async for prompt, together in events:
            for event in together:
                tally.feed(prompt, event)
            yield [written for event in together for written in stream.feed(prompt, event)]
        yield stream.end(await self._ended(tally))

    async def _ended(self, tally: "Tally") -> Usage:
        usage = tally.finish()
        if self.formats.keep is not None:
            await self.formats.keep(usage)
        return usage

    def _opened(self, *, streams: bool) -> AbstractAsyncContextManager[Opened]:
        watches = [Watch.generation(one, self.metrics, streams=streams) for one in self.requests]
        return opened(self.service, self.requests, watches)

    async def _accepted(self, generations: Sequence[Generation]) -> Accepted:
        model = generations[0].model
        tokens = sum(one.prompt_tokens for one in generations)
        if not self.formats.echo:
            return Accepted(model, prompt_tokens=tokens)
        texts = [await one.prompt_text() for one in generations]
        return Accepted(model, tuple(texts), tokens)


async def _alone(events: Sequence[StreamEvent]) -> AsyncGenerator[Sequence[StreamEvent], None]:
    yield events


class Tally:
    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        """(tokens, cached tokens) by prompt index."""
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._accepted = self._rejected = 0

    def feed(self, prompt: int, event: Event) -> None:
        if isinstance(event, Finished):
            self._completion_tokens += event.usage.completion_tokens
            self._reasoning_tokens += event.usage.reasoning_tokens
            self._accepted += event.usage.accepted_guesses
            self._rejected += event.usage.rejected_guesses
            # Choices share their prompt: count the smallest cache hit.
            cached = event.usage.cached_tokens
            _, before = self._prompts.get(prompt, (0, cached))
            self._prompts[prompt] = (event.usage.prompt_tokens, min(before, cached))

    def finish(self) -> Usage:
        return Usage(
            prompt_tokens=sum(tokens for tokens, _ in self._prompts.values()),
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(cached for _, cached in self._prompts.values()),
            reasoning_tokens=self._reasoning_tokens,
            accepted_guesses=self._accepted,
            rejected_guesses=self._rejected,
        )


@asynccontextmanager
async def opened(
    service: InferenceService, requests: Sequence[InferenceRequest], watches: Sequence[Watch]
) -> AsyncIterator[Opened]:
    """Yields one generation per request, and the events of all of them."""
    async with AsyncExitStack() as stack:
        generations = await stack.enter_async_context(service.open_all(requests, watches))
        sources = [generation.events() for generation in generations]
        events: AsyncIterator[IndexedEvents]
        if len(sources) == 1:
            events = await stack.enter_async_context(aclosing(_numbered(sources[0])))
        else:
            events = await stack.enter_async_context(_merged(sources))
        yield generations, events


async def _numbered(events: AsyncIterator[list[Event]]) -> AsyncGenerator[IndexedEvents, None]:
    async for together in events:
        yield 0, together


@asynccontextmanager
async def _merged(
    sources: Sequence[AsyncIterator[list[Event]]],
) -> AsyncIterator[AsyncIterator[IndexedEvents]]:
    queue: asyncio.Queue[IndexedEvents | Exception | None] = asyncio.Queue(MERGE_BUFFER)

    async def pump(index: int, source: AsyncIterator[list[Event]]) -> None:
        try:
            async for together in source:
                await queue.put((index, together))
        except Exception as error:  # noqa: BLE001
            # Raised again where the queue is read.
            await queue.put(error)
        else:
            await queue.put(None)

    async def drain() -> AsyncGenerator[IndexedEvents, None]:
        left = len(sources)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item

    pumps = [asyncio.create_task(pump(n, source)) for n, source in enumerate(sources)]
    try:
        async with aclosing(drain()) as events:
            yield events
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.wait(pumps)
