"""`POST /api/embed`, and `POST /api/embeddings` that came before it."""

import struct
import time

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.http.dependencies import CallerDep, EmbeddingsDep, MetricsDep, PoolDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.streaming import WholeAnswer
from mlx_server.api.ollama.answers import nanoseconds
from mlx_server.api.ollama.wire import documented
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.schemas.internal import Caller
from mlx_server.schemas.ollama.common import ModelRequest
from mlx_server.schemas.ollama.embed import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
)
from mlx_server.services import residence
from mlx_server.services.embeddings import EmbeddingRequest, EmbeddingService
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.watch import Watch

FLOAT32_BYTES = 4

router = APIRouter(prefix="/api", route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 429, 500, 503, 504)


@router.post("/embed", response_model=EmbedResponse, responses=ERRORS)
async def embed(
    body: EmbedRequest,
    caller: CallerDep,
    embeddings: EmbeddingsDep,
    pool: PoolDep,
    metrics: MetricsDep,
) -> Response:
    """Make a vector of each text."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    texts = [] if texts == [""] else texts
    request = EmbeddingRequest(
        model=body.model,
        inputs=texts,
        caller=caller,
        dimensions=body.dimensions or None,
        cut=body.truncate,
        keep_alive=body.keep_alive,
    )

    async def answer() -> bytes:
        started = time.monotonic()
        if not texts:
            await _switch(pool, body)
            return _embedded(body.model, [], started, time.monotonic() - started, 0)
        made = await _vectors(embeddings, request, metrics)
        return _embedded(body.model or made.model, made.vectors, started, made.load, made.tokens)

    return WholeAnswer(answer)


@router.post("/embeddings", response_model=EmbeddingsResponse, responses=ERRORS)
async def embeddings(
    body: EmbeddingsRequest,
    caller: CallerDep,
    embeddings: EmbeddingsDep,
    pool: PoolDep,
    metrics: MetricsDep,
) -> Response:
    """Make a vector of a text."""
    request = _request(body, body.prompt, caller)

    async def answer() -> bytes:
        if not body.prompt:
            await _switch(pool, body)
            return msgspec.json.encode({"embedding": []})
        made = await _vectors(embeddings, request, metrics)
        return msgspec.json.encode({"embedding": made.vectors[0]})

    return WholeAnswer(answer)


def _request(body: EmbeddingsRequest, text: str, caller: Caller) -> EmbeddingRequest:
    return EmbeddingRequest(
        model=body.model, inputs=[text], caller=caller, cut=True, keep_alive=body.keep_alive
    )


class _Made(msgspec.Struct):
    model: str
    vectors: list[tuple[float, ...]]
    tokens: int
    load: float
    """Seconds."""


async def _vectors(
    embeddings: EmbeddingService, request: EmbeddingRequest, metrics: Metrics
) -> _Made:
    watch = Watch.embeddings(request.model, len(request.inputs), request.caller, metrics)
    async with embeddings.open(request, watch) as vectors:
        made: list[tuple[float, ...]] = [()] * len(request.inputs)
        async for together in vectors.arrivals():
            for index, numbers in together:
                made[index] = struct.unpack(f"<{len(numbers) // FLOAT32_BYTES}f", numbers)
        return _Made(vectors.model, made, vectors.prompt_tokens, vectors.load_seconds)


async def _switch(pool: ModelPoolManager, body: ModelRequest) -> None:
    if body.keep_alive == 0:
        await residence.let_go(pool, body.model)
    else:
        await residence.load(pool, body.model, body.keep_alive, "embed")


def _embedded(
    model: str, vectors: list[tuple[float, ...]], started: float, load: float, tokens: int
) -> bytes:
    """Without Pydantic, which is ten times slower at numbers."""
    return msgspec.json.encode(
        {
            "model": model,
            "embeddings": vectors,
            "total_duration": nanoseconds(time.monotonic() - started),
            "load_duration": nanoseconds(load),
            "prompt_eval_count": tokens,
        }
    )
