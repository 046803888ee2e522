"""`POST /v1/embeddings`: to an internal request, and from vectors to OpenAI's shape."""

import asyncio
import struct
from base64 import b64encode
from typing import Annotated, cast

import msgspec
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from mlx_server.api.http.dependencies import CallerDep, MetricsDep
from mlx_server.api.http.failures import documented
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.streaming import WholeAnswer
from mlx_server.schemas.internal import Caller, Usage
from mlx_server.schemas.openai.embeddings import (
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)
from mlx_server.services import embeddings as service
from mlx_server.services.embeddings import EmbeddingService
from mlx_server.telemetry import RequestTimer

FLOAT32_BYTES = 4
WRITTEN_AT_ONCE = 16
"""Vectors, between which the event loop may see to others."""
EMPTY_DATA = b'"data":[]'

router = APIRouter(prefix="/v1", route_class=JsonRoute, strict_content_type=False)


async def _service(request: Request) -> EmbeddingService:
    return cast(EmbeddingService, request.app.state.embeddings)


@router.post(
    "/embeddings",
    response_model=EmbeddingList,
    responses=documented(400, 401, 403, 404, 413, 429, 500, 503, 504),
)
async def create_embeddings(
    body: EmbeddingRequest,
    caller: CallerDep,
    embeddings: Annotated[EmbeddingService, Depends(_service)],
    metrics: MetricsDep,
) -> Response:
    """Make a vector of a text, or of each of several."""
    timer = RequestTimer(metrics)
    request = to_internal(body, caller)

    async def answer() -> bytes:
        async with embeddings.open(request) as vectors:
            timer.opened(vectors.model)
            written = [b""] * len(request.inputs)
            async for together in vectors.arrivals():
                for count, (index, numbers) in enumerate(together, 1):
                    written[index] = _embedding(index, numbers, body.encoding_format)
                    if count % WRITTEN_AT_ONCE == 0:
                        await asyncio.sleep(0)
            timer.finished(Usage(vectors.prompt_tokens, completion_tokens=0))
            return _whole(written, vectors.model, vectors.prompt_tokens)

    return WholeAnswer(answer)


def to_internal(body: EmbeddingRequest, caller: Caller) -> service.EmbeddingRequest:
    """What the body asks for, free of the protocol."""
    return service.EmbeddingRequest(
        model=body.model,
        inputs=body.inputs,
        caller=caller,
        dimensions=body.dimensions,
        priority=body.priority,
        keep_alive=body.keep_alive,
    )


def _embedding(index: int, numbers: bytes, form: str) -> bytes:
    """An `Embedding` as JSON, `numbers` being the bytes of the vector's float32 numbers.

    Pydantic would take ten times as long for it.
    """
    vector: str | tuple[float, ...]
    if form == "base64":
        vector = b64encode(numbers).decode("ascii")
    else:
        vector = struct.unpack(f"<{len(numbers) // FLOAT32_BYTES}f", numbers)
    return msgspec.json.encode({"object": "embedding", "index": index, "embedding": vector})


def _whole(written: list[bytes], model: str, tokens: int) -> bytes:
    """The answer around vectors that have been written already."""
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    frame = EmbeddingList(object="list", data=[], model=model, usage=usage).to_json()
    before, _, after = frame.partition(EMPTY_DATA)
    return b"".join((before, b'"data":[', b",".join(written), b"]", after))
