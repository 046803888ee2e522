"""From texts to vectors: tokenize, check, hold the model, hand over what its engine makes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from opentelemetry import trace

from mlx_server import __version__
from mlx_server.config import Settings
from mlx_server.engine.protocol import Embed
from mlx_server.errors import BadRequest, ContextLengthExceeded
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.stream import RowStream
from mlx_server.schemas.internal import Caller
from mlx_server.services.backpressure import Admission


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts, or token ids that are taken as they are, to make a vector of each.

    `dimensions` keeps that many of a vector's first numbers, scaled to length 1; None keeps all.
    """

    model: str
    inputs: list[str] | list[list[int]]
    caller: Caller
    dimensions: int | None = None
    priority: int = 0
    keep_alive: float | None = None
    """Seconds that the model stays loaded after this request; None leaves it to the settings."""


class EmbeddingService:
    """Turns requests into vectors."""

    def __init__(self, pool: ModelPoolManager, settings: Settings) -> None:
        self.pool = pool
        self._admission = Admission(settings)

    @asynccontextmanager
    async def open(self, request: EmbeddingRequest) -> AsyncIterator["Vectors"]:
        """Tokenize and check the texts, hold the model, and hand its vectors to the caller.

        The engine begins at once. Leaving the block aborts what still runs and lets the model go.
        Raises the errors a client should see as a status: BadRequest, ContextLengthExceeded,
        ModelNotFound, ModelLoading, ModelLoadFailed, TooManyRequests.
        """
        arrived = asyncio.get_running_loop().time()
        async with AsyncExitStack() as stack:
            span = stack.enter_context(_span(request))
            model = await stack.enter_async_context(
                self.pool.acquire(request.model, request.keep_alive, "embed")
            )
            texts = await _prepared(request, model)
            self._admission.check_queue(model, 1)
            stack.enter_context(self._admission.timed(model.id))
            wanted = Embed(
                id=0,  # the engine's client gives the real one
                texts=texts,
                dimensions=request.dimensions,
                caller=request.caller.key,
                priority=request.priority,
            )
            sent = model.engine.embed(wanted, request.caller.request_id)
            stream = stack.enter_context(sent)
            vectors = Vectors(model, texts, stream)
            span.set_attribute("gen_ai.response.model", model.id)
            span.set_attribute("gen_ai.usage.input_tokens", vectors.prompt_tokens)
            if request.caller.charge is not None:
                stack.push_async_callback(request.caller.charge, vectors.prompt_tokens)
            stack.enter_context(self._admission.limited([stream], arrived, model.id))
            yield vectors


class Vectors:
    """A request that was accepted, and the vectors that come of it."""

    def __init__(self, model: LoadedModel, texts: list[list[int]], stream: RowStream) -> None:
        self.model = model.id
        """The id under which the model is known, which may differ from the alias asked for."""
        self.prompt_tokens = sum(map(len, texts))
        self._stream = stream

    async def arrivals(self) -> AsyncIterator[list[tuple[int, bytes]]]:
        """Pairs of a text's index and its vector's float32 numbers, the lowest byte first.

        They come in any order, those together that were computed together. Iterate once. Raises
        EngineFailed when the engine fails the request or cannot survive it, and Unavailable or
        RequestTimeout when it had to be given up.
        """
        async for _, row in self._stream.rows():
            if row.vectors:
                yield row.vectors


async def _prepared(request: EmbeddingRequest, model: LoadedModel) -> list[list[int]]:
    """The tokens of each text. Raises what is wrong with the request."""
    context, width = model.facts.context_length, model.facts.width
    if width == 0:  # its folder became another model's since it was loaded
        raise BadRequest("This model makes no embeddings.", param="model")
    if request.dimensions is not None and request.dimensions > width:
        raise BadRequest(f"`dimensions` is at most {width} for this model.", param="dimensions")
    texts = [one for one in request.inputs if isinstance(one, str)]
    tokens = [one for one in request.inputs if not isinstance(one, str)]
    if texts:
        tokens = await model.text.tokenize_all(texts, context)
    for index, text in enumerate(tokens):
        _check(index, text, model)
    return tokens


def _check(index: int, tokens: list[int], model: LoadedModel) -> None:
    """Refuse a text that the model cannot take."""
    context, vocabulary = model.facts.context_length, model.facts.vocab_size
    if not tokens:
        raise BadRequest(f"Text {index} of the input holds no token.", param=f"input.{index}")
    if len(tokens) > context:
        raise ContextLengthExceeded(
            f"This model takes texts of up to {context} tokens; text {index} of the input has "
            f"{len(tokens)}.",
            param=f"input.{index}",
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise BadRequest(
            f"Text {index} of the input has a token id outside this model's vocabulary of "
            f"{vocabulary}.",
            param=f"input.{index}",
        )


@contextmanager
def _span(request: EmbeddingRequest) -> Iterator[trace.Span]:
    """A span around one request, with the GenAI semantic conventions' attributes."""
    attributes: dict[str, str | int] = {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "mlx_server",
        "gen_ai.request.model": request.model,
        "mlx_server.inputs": len(request.inputs),
        "mlx_server.request_id": request.caller.request_id,
    }
    tracer = trace.get_tracer("mlx_server", __version__)
    with tracer.start_as_current_span(
        f"embeddings {request.model}", attributes=attributes, record_exception=False
    ) as span:
        yield span
