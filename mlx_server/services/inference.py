"""The one inference path of all protocols: prompt → tokens → text events."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile

import msgspec

from mlx_server.engine.protocol import Generate, Logprobs, Row
from mlx_server.errors import BadRequest, ContextLengthExceeded
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.stream import RowStream
from mlx_server.models.text.client import ModelText
from mlx_server.models.text.names import spell
from mlx_server.models.text.protocol import Prepared
from mlx_server.models.text.syntax import Thinking
from mlx_server.schemas.internal import (
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
    Timing,
)
from mlx_server.services.backpressure import Backpressure, check_priority
from mlx_server.services.output.channels import ChannelReader
from mlx_server.services.output.choices import ParsedChoice, PlainChoice
from mlx_server.services.output.completion import OutputReader
from mlx_server.services.output.text import prompt_logprobs
from mlx_server.telemetry.watch import Watch

SEED_BITS = 64
SEED_STRIDE = 0x9E3779B97F4A7C15
"""The golden ratio in 64 bits: odd, so that choices' seeds differ."""


class InferenceService:
    def __init__(self, pool: ModelPoolManager, backpressure: Backpressure) -> None:
        self._pool = pool
        self._backpressure = backpressure

    @asynccontextmanager
    async def open_all(
        self, requests: Sequence[InferenceRequest], watches: Sequence[Watch]
    ) -> AsyncIterator[list["Generation"]]:
        """Start requests for one model, all or none; leaving the block aborts them. Raises
        BadRequest, Forbidden, ContextLengthExceeded, ModelNotFound, ModelLoading, ModelLoadFailed
        and TooManyRequests.
        """
        first = requests[0]
        arrived = asyncio.get_running_loop().time()
        clock = Clock()
        async with AsyncExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch)
            check_priority(first.caller, first.priority)
            # Once for all: a second acquisition could deadlock on a model change.
            model = await stack.enter_async_context(
                self._pool.acquire(first.model, first.keep_alive)
            )
            clock.loaded()
            for watch in watches:
                watch.loaded(model.id)
            spelled = [spell(request.prompt, model.text.syntax.calls) for request in requests]
            requests = [replace(r, prompt=s.prompt) for r, s in zip(requests, spelled, strict=True)]
            prompts = [await _prepare(request, model) for request in requests]
            predictions = [await _predicted(request, model) for request in requests]
            self._backpressure.check_queue(
                model.id, model.engine.in_flight, sum(request.n for request in requests)
            )
            stack.enter_context(self._backpressure.timed(model.id))
            streams = []
            generations = []
            for request, prompt, predicted, watch, one in zip(
                requests, prompts, predictions, watches, spelled, strict=True
            ):
                watch.prepared(len(prompt.tokens))
                choices = _engine_requests(prompt, predicted, request, model)
                stream = model.engine.generate(choices, request.caller.request_id, watch)
                streams.append(stack.enter_context(stream))
                generation = Generation(
                    request, model, prompt, stream, watch, one.names, replace(clock)
                )
                generations.append(generation)
                stack.push_async_callback(generation.settle)
            stack.enter_context(self._backpressure.timeouts(streams, arrived, model.id))
            yield generations


class Generation:
    def __init__(
        self,
        request: InferenceRequest,
        model: LoadedModel,
        prompt: Prepared,
        stream: RowStream,
        watch: Watch,
        names: Mapping[str, str],
        clock: "Clock",
    ) -> None:
        """`names` are tools' own, by their stand-ins in `request`."""
        self.model = model.id
        self.prompt_tokens = len(prompt.tokens)
        self._request = request
        self._text = model.text
        self._tokens = prompt.tokens
        self._stream = stream
        self._watch = watch
        self._clock = clock
        self._charge = request.caller.charge
        self._choices = [
            _choice(index, request, prompt, model.text, names) for index in range(request.n)
        ]

    async def settle(self) -> None:
        """Charge the caller, once, for all tokens. Call when no more will come."""
        charge, self._charge = self._charge, None
        if charge is not None:
            completions = sum(choice.completion_tokens for choice in self._choices)
            await charge(self.prompt_tokens + completions)

    async def prompt_text(self) -> str:
        return await self._text.decode(self._tokens)

    async def events(self) -> AsyncIterator[list[Event]]:
        """All choices' events, grouped as they arrive. Iterate once. Raises EngineFailed if the
        engine fails or keeps ending on the request, Unavailable or RequestTimeout on a timeout.
        """
        async for rows in self._stream.arrivals():
            events: list[Event] = []
            for index, row in rows:
                if row.prompt_logprobs is not None and index == 0:
                    events.append(await self._scored(row.prompt_logprobs))
                choice = self._choices[index]
                if isinstance(choice, PlainChoice):
                    new = choice.take(row)
                else:
                    new = await choice.take(row)
                self._watch.told(new)
                self._observe(new, row)
                events += new
            if events:
                yield events
        # Before the caller sees the end and may ask for more.
        await self.settle()

    async def _scored(self, logprobs: Sequence[Logprobs | None]) -> PromptScored:
        decoded = await self.prompt_text()
        entries = await asyncio.to_thread(
            prompt_logprobs, self._text, self._tokens, logprobs, decoded
        )
        return PromptScored(entries)

    def _observe(self, events: list[Event], row: Row) -> None:
        if row.tokens:
            self._clock.first_token()
        if events and isinstance(last := events[-1], Finished):
            events[-1] = replace(last, timing=self._clock.timing(self._stream.begun_at))
            if row.finish is None:  # ended by a stop string or a call
                self._stream.abort(last.choice)


@dataclass(slots=True)
class Clock:
    """What a request took; monotonic seconds."""

    started_at: float = field(default_factory=time.monotonic)
    loaded_at: float | None = None
    token_at: float | None = None

    def loaded(self) -> None:
        self.loaded_at = time.monotonic()

    def first_token(self) -> None:
        if self.token_at is None:
            self.token_at = time.monotonic()

    def timing(self, begun_at: float | None) -> Timing:
        now = time.monotonic()
        loaded = self.loaded_at or now
        begun = begun_at or loaded
        first = self.token_at or now
        return Timing(
            load=loaded - self.started_at,
            prefill=max(0.0, first - begun),
            decode=now - first,
            total=now - self.started_at,
        )


async def _prepare(request: InferenceRequest, model: LoadedModel) -> Prepared:
    prompt = await model.text.prepare(
        request.prompt, request.constraint, model.facts.context_length
    )
    _check_length(len(prompt.tokens), request, model)
    _check_vocabulary(prompt.tokens, request, model)
    return prompt


def _check_length(length: int, request: InferenceRequest, model: LoadedModel) -> None:
    """Raises BadRequest and ContextLengthExceeded unless there is room for one token."""
    context, longest = model.facts.context_length, model.facts.longest_sequence
    param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
    if length == 0:
        raise BadRequest("The prompt holds no token.", param=param)
    least = 0 if request.max_tokens == 0 else 1
    if length + least > context:
        raise ContextLengthExceeded(
            # Agents find the numbers by this wording.
            f"The prompt is too long: {length} tokens > {context} maximum of this model's context.",
            param=param,
        )
    if length + least > longest:
        raise BadRequest(
            f"The prompt is too long: {length} tokens > {longest} maximum of one request in the "
            f"KV cache of {model.facts.kv_limit:,} bytes.",
            param=param,
            code="insufficient_memory",
        )


def _check_vocabulary(tokens: list[int], request: InferenceRequest, model: LoadedModel) -> None:
    vocabulary = model.facts.vocab_size
    if not all(0 <= token < vocabulary for token in tokens):
        raise BadRequest(
            f"The prompt has a token id outside this model's vocabulary of {vocabulary}.",
            param="prompt",
        )
    if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
        raise BadRequest(
            f"A token id is outside this model's vocabulary of {vocabulary}.", param="logit_bias"
        )


async def _predicted(request: InferenceRequest, model: LoadedModel) -> list[int]:
    """The tokens of a prediction, as far as an answer can be long."""
    if not request.prediction:
        return []
    longest = model.facts.longest_sequence
    whole, front = await model.text.tokenize_cut([request.prediction, ""], longest)
    # An answer has none of the special tokens that stand before texts.
    skipped = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, front, strict=False))
    )
    return whole[skipped:]


def _engine_requests(
    prompt: Prepared, predicted: list[int], request: InferenceRequest, model: LoadedModel
) -> list[Generate]:
    room = model.facts.longest_sequence - len(prompt.tokens)
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    own = {name: value for name, value in model.sampling.items() if name in request.unasked}
    # A text complete by its grammar cannot go on.
    ignore_eos = request.ignore_eos and prompt.grammar is None
    stop_tokens = [] if ignore_eos else sorted(model.text.stop_tokens)
    return [
        Generate(
            id=0,  # set by the supervisor
            prompt=prompt.tokens,
            sampling=msgspec.structs.replace(
                request.sampling, **own, seed=(seed + index * SEED_STRIDE) % (1 << SEED_BITS)
            ),
            max_tokens=room if request.max_tokens is None else min(room, request.max_tokens),
            stop_tokens=stop_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
            grammar=prompt.grammar,
            caller=request.caller.key,
            priority=request.priority,
            prediction=predicted,
        )
        for index in range(request.n)
    ]


def _choice(
    index: int,
    request: InferenceRequest,
    prompt: Prepared,
    text: ModelText,
    names: Mapping[str, str],
) -> PlainChoice | ParsedChoice:
    chat = request.prompt if isinstance(request.prompt, ChatPrompt) else None
    syntax = text.syntax
    if chat is None or not (syntax.reasoning or syntax.channels or chat.use):
        return PlainChoice(index, text, request.stop, len(prompt.tokens))
    reader: OutputReader | ChannelReader
    if syntax.channels:
        reader = ChannelReader(chat.use, prompt.thinking)
    else:
        reader = OutputReader(syntax, chat.use, thinking=prompt.thinking is Thinking.OPEN)
    return ParsedChoice(index, text, reader, chat.use, request.stop, len(prompt.tokens), names)
