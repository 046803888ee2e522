"""Embeddings: texts → tokens → vectors."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from mlx_server.engine.protocol import Embed
from mlx_server.errors import BadRequest, ContextLengthExceeded
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.stream import RowStream
from mlx_server.schemas.internal import Caller
from mlx_server.services.backpressure import Backpressure, check_priority
from mlx_server.telemetry.watch import Watch


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """`dimensions` truncates vectors and normalizes them; None keeps all. `cut` shortens texts to
    the context.
    """

    model: str
    inputs: list[str] | list[list[int]]
    caller: Caller
    query: str | None = None
    """To score the inputs, which are texts, against: a model that judges pairs gives one number for
    each, any other the vector of the query, then those of the inputs.
    """
    dimensions: int | None = None
    cut: bool = False
    priority: int = 0
    keep_alive: float | None = None
    """Seconds; None: per settings."""


class EmbeddingService:
    def __init__(self, pool: ModelPoolManager, backpressure: Backpressure) -> None:
        self._pool = pool
        self._backpressure = backpressure

    @asynccontextmanager
    async def open(self, request: EmbeddingRequest, watch: Watch) -> AsyncIterator["Vectors"]:
        """Leaving the block aborts the request. Raises BadRequest, Forbidden,
        ContextLengthExceeded, ModelNotFound, ModelLoading, ModelLoadFailed and TooManyRequests.
        """
        caller = request.caller
        arrived = asyncio.get_running_loop().time()
        async with AsyncExitStack() as stack:
            stack.enter_context(watch)
            check_priority(caller, request.priority)
            asked = time.monotonic()
            model = await stack.enter_async_context(
                self._pool.acquire(
                    request.model,
                    request.keep_alive,
                    "embed" if request.query is None else "rank",
                )
            )
            load_seconds = time.monotonic() - asked
            watch.loaded(model.id)
            texts, seconds = await _prepare(request, model)
            self._backpressure.check_queue(model.id, model.engine.in_flight, 1)
            stack.enter_context(self._backpressure.timed(model.id))
            engine_request = Embed(
                id=0,  # set by the supervisor
                texts=texts,
                seconds=seconds,
                dimensions=request.dimensions,
                caller=caller.key,
                priority=request.priority,
            )
            watch.prepared(sum(map(len, texts)))
            stream = stack.enter_context(
                model.engine.embed(engine_request, caller.request_id, watch)
            )
            vectors = Vectors(model, texts, stream, load_seconds)
            if caller.charge is not None:
                stack.push_async_callback(caller.charge, vectors.prompt_tokens)
            stack.enter_context(self._backpressure.timeouts([stream], arrived, model.id))
            yield vectors


class Vectors:
    def __init__(
        self,
        model: LoadedModel,
        texts: list[list[int]],
        stream: RowStream,
        load_seconds: float,
    ) -> None:
        self.model = model.id
        self.scores = model.scores
        self.count = len(texts)
        self.load_seconds = load_seconds
        self.prompt_tokens = sum(map(len, texts))
        self._stream = stream

    async def arrivals(self) -> AsyncIterator[list[tuple[int, bytes]]]:
        """(text index, vector as little-endian float32) pairs, in any order. Iterate once. Raises
        EngineFailed if the engine fails or keeps ending on the request, Unavailable or
        RequestTimeout on a timeout.
        """
        async for _, row in self._stream.rows():
            if row.vectors:
                yield row.vectors


async def _prepare(
    request: EmbeddingRequest, model: LoadedModel
) -> tuple[list[list[int]], list[int]]:
    """Tokens, and where the second texts of pairs begin."""
    context, width = model.facts.context_length, model.facts.width
    if width == 0:  # loaded before its folder changed
        raise BadRequest("This model makes no embeddings.", param="model")
    if request.dimensions is not None and request.dimensions > width:
        raise BadRequest(f"`dimensions` is at most {width} for this model.", param="dimensions")
    texts = [one for one in request.inputs if isinstance(one, str)]
    if request.query is not None:
        if model.scores:
            pairs = await model.text.tokenize_pairs(request.query, texts, context)
            return pairs.tokens, pairs.seconds
        texts.insert(0, request.query)
    tokens = [one for one in request.inputs if not isinstance(one, str)]
    if texts and request.cut:
        tokens = await model.text.tokenize_cut(texts, context)
    elif texts:
        tokens = await model.text.tokenize_all(texts, context)
    for index, text in enumerate(tokens):
        _check(index, text, model)
    return tokens, []


def _check(index: int, tokens: list[int], model: LoadedModel) -> None:
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
