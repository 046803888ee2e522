"""What chat completions and completions share: opening generations, counting, encoding events."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

import msgspec
from starlette.responses import Response

from mlx_server import __version__
from mlx_server.api.http.streaming import DONE, StreamedAnswer, WholeAnswer
from mlx_server.config import Settings
from mlx_server.engine.protocol import Sampling
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import (
    Event,
    Finished,
    InferenceRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.schemas.openai.common import (
    CompletionTokensDetails,
    CompletionUsage,
    GenerationRequest,
    PromptTokensDetails,
)
from mlx_server.services.inference import Generation, InferenceService
from mlx_server.telemetry import Metrics, RequestTimer

SYSTEM_FINGERPRINT = f"mlx-server-{__version__}"
END_MARK = "[DONE]"
"""The data of a stream's last event."""
MERGE_BUFFER = 64
LEAST_TEMPERATURE = 2.0**-126
"""The smallest normal float32; devices may take smaller ones for 0."""

SAID = (TextDelta, ReasoningDelta, ToolCallStart, ToolCallDelta)
"""The events that a client sees as something new."""
IndexedEvents = tuple[int, list[Event]]
"""Events that came together and the index of the prompt they belong to."""


@dataclass(frozen=True, slots=True)
class Header:
    """What every object of one answer repeats, and the prompts' texts if they are echoed."""

    id: str
    created: int
    model: str
    prompts: tuple[str, ...] = ()


class AnswerFormat(Protocol):
    """Folds events into one body."""

    def feed(self, prompt: int, event: Event) -> None:
        """Take in an event."""

    def body(self, usage: Usage) -> bytes:
        """The whole answer, as JSON."""


class StreamFormat(Protocol):
    """Turns events into server-sent events."""

    def begin(self) -> bytes:
        """What comes before the first event."""

    def feed(self, prompt: int, event: Event) -> bytes:
        """What an event becomes, which can be nothing."""

    def end(self, usage: Usage) -> bytes:
        """What comes after the last event, except the end mark."""


@dataclass(frozen=True, slots=True)
class Protocols:
    """How one endpoint writes its answers."""

    id_prefix: str
    answer: Callable[[Header], AnswerFormat]
    stream: Callable[[Header], StreamFormat]
    echo: bool = False

    async def header(self, generations: Sequence[Generation]) -> Header:
        """A fresh header for what `generations` answer."""
        texts = [await one.prompt_text() for one in generations] if self.echo else []
        id = f"{self.id_prefix}-{uuid4().hex}"
        return Header(id, int(time.time()), generations[0].model, tuple(texts))


@dataclass(slots=True)
class Generator:
    """Runs the requests that one HTTP request asks for, and writes the answer."""

    service: InferenceService
    settings: Settings
    metrics: Metrics
    requests: Sequence[InferenceRequest]
    format: Protocols
    timer: RequestTimer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = RequestTimer(self.metrics)

    def answer(self) -> Response:
        """The answer in one piece."""
        return WholeAnswer(self._whole)

    def stream(self) -> Response:
        """The answer as it comes."""
        request_id = self.requests[0].caller.request_id
        return StreamedAnswer(self._events(), self.settings, request_id)

    async def _whole(self) -> bytes:
        async with opened(self.service, self.requests) as (generations, events):
            header = await self.format.header(generations)
            self.timer.opened(header.model)
            tally = Tally(self.timer)
            answer = self.format.answer(header)
            async for prompt, together in events:
                for event in together:
                    tally.feed(prompt, event)
                    answer.feed(prompt, event)
            return answer.body(tally.finish())

    @asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[bytes]]:
        async with opened(self.service, self.requests) as (generations, events):
            header = await self.format.header(generations)
            self.timer.opened(header.model)
            yield self._encoded(events, self.format.stream(header))

    async def _encoded(
        self, events: AsyncIterator[IndexedEvents], stream: StreamFormat
    ) -> AsyncIterator[bytes]:
        tally = Tally(self.timer)
        yield stream.begin()
        async for prompt, together in events:
            for event in together:
                tally.feed(prompt, event)
            # Sending costs by the piece: what came together goes together.
            if data := b"".join([stream.feed(prompt, event) for event in together]):
                yield data
        yield stream.end(tally.finish()) + DONE


class ChunkTemplate:
    """Writes the events that differ in a choice's index and its text only.

    Each is rendered once per index, in full; after that only the text is written anew.
    """

    _HOLE = "\0"

    def __init__(self, render: Callable[[int, str], bytes]) -> None:
        self._render = render
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def fill(self, index: int, text: str) -> bytes:
        """The event with the `text` of choice `index`."""
        around = self._around.get(index)
        if around is None:
            around = self._around[index] = self._split(index)
        return around[0] + msgspec.json.encode(text) + around[1]

    def _split(self, index: int) -> tuple[bytes, bytes]:
        # The last such string: no id or name comes after the text.
        rendered = self._render(index, self._HOLE)
        before, _, after = rendered.rpartition(msgspec.json.encode(self._HOLE))
        return before, after


class Tally:
    """Adds up the usage of all choices and times what they say."""

    def __init__(self, timer: RequestTimer) -> None:
        self._timer = timer
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion_tokens = 0
        self._reasoning_tokens = 0

    def feed(self, prompt: int, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, SAID):
            # One number per sequence; no request has this many choices.
            self._timer.text(prompt << 16 | event.choice)
        elif isinstance(event, Finished):
            self._completion_tokens += event.usage.completion_tokens
            self._reasoning_tokens += event.usage.reasoning_tokens
            # The prompt of several choices is one prompt. Its tokens came from a cache as far as
            # they did for every choice.
            cached = event.usage.cached_tokens
            _, before = self._prompts.get(prompt, (0, cached))
            self._prompts[prompt] = (event.usage.prompt_tokens, min(before, cached))

    def finish(self) -> Usage:
        """The sum, counted as one finished request."""
        usage = Usage(
            prompt_tokens=sum(tokens for tokens, _ in self._prompts.values()),
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(cached for _, cached in self._prompts.values()),
            reasoning_tokens=self._reasoning_tokens,
        )
        self._timer.finished(usage)
        return usage


def usage_body(usage: Usage) -> CompletionUsage:
    """Token counts as OpenAI writes them."""
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens),
    )


def sampling(body: GenerationRequest) -> Sampling:
    """How the next token is drawn.

    Nothing but the likeliest token is left by a `top_p` of 0, nor by a temperature that becomes 0
    as a float32, which logits cannot be divided by.
    """
    greedy = body.top_p == 0 or body.temperature < LEAST_TEMPERATURE
    return Sampling(
        temperature=0.0 if greedy else body.temperature,
        top_p=1.0 if greedy else body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
    )


def check_choices(body: GenerationRequest, settings: Settings) -> None:
    """Raise BadRequest when more choices are asked for than the server's owner allows."""
    if body.n > settings.max_choices:
        raise BadRequest(f"`n` is at most {settings.max_choices} on this server.", param="n")


@asynccontextmanager
async def opened(
    service: InferenceService, requests: Sequence[InferenceRequest]
) -> AsyncIterator[tuple[Sequence[Generation], AsyncIterator[IndexedEvents]]]:
    """Hold a generation per request; yields them and the events of all."""
    async with AsyncExitStack() as stack:
        generations = await stack.enter_async_context(service.open_all(requests))
        sources = [generation.events() for generation in generations]
        events: AsyncIterator[IndexedEvents]
        if len(sources) == 1:
            events = await stack.enter_async_context(aclosing(_numbered(sources[0])))
        else:
            events = await stack.enter_async_context(_merged(sources))
        yield generations, events


async def _numbered(events: AsyncIterator[list[Event]]) -> AsyncGenerator[IndexedEvents, None]:
    async for one in events:
        yield 0, one


@asynccontextmanager
async def _merged(
    sources: Sequence[AsyncIterator[list[Event]]],
) -> AsyncIterator[AsyncIterator[IndexedEvents]]:
    """The events of all `sources` as they come, numbered by source. The first error ends all."""
    queue: asyncio.Queue[IndexedEvents | Exception | None] = asyncio.Queue(MERGE_BUFFER)

    async def pump(index: int, source: AsyncIterator[list[Event]]) -> None:
        try:
            async for one in source:
                await queue.put((index, one))
        except Exception as error:  # noqa: BLE001
            # Raised again by whoever reads the queue.
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
