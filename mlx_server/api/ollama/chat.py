"""`POST /api/chat` and `POST /api/generate`."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.generation import AnswerFormats, Generator
from mlx_server.api.http.dependencies import CallerDep, MetricsDep, PoolDep, ServiceDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import json_lines
from mlx_server.api.http.streaming import WholeAnswer
from mlx_server.api.ollama.answers import (
    Answer,
    Stream,
    Write,
    bare,
    chat_response,
    generate_response,
)
from mlx_server.api.ollama.prompts import chat_inference, generate_inference
from mlx_server.api.ollama.wire import documented
from mlx_server.errors import BadRequest
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.store.capabilities import read_capabilities
from mlx_server.models.store.catalog import Catalog
from mlx_server.schemas.internal import InferenceRequest
from mlx_server.schemas.ollama.chat import ChatRequest, GenerateRequest
from mlx_server.schemas.ollama.common import (
    ChatResponse,
    GenerateResponse,
    GenerationRequest,
    OllamaError,
)
from mlx_server.services import residence
from mlx_server.services.inference import InferenceService
from mlx_server.telemetry.metrics import Metrics

router = APIRouter(prefix="/api", route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 429, 500, 503, 504)


@router.post(
    "/chat",
    response_model=ChatResponse,
    responses=ERRORS | json_lines([ChatResponse, OllamaError]),
)
async def chat(
    body: ChatRequest, caller: CallerDep, service: ServiceDep, pool: PoolDep, metrics: MetricsDep
) -> Response:
    """Answer a conversation."""
    if not body.messages:
        return switched(pool, body, chat_response)
    await check_thinks(pool.catalog, body)
    return answered(body, chat_inference(body, caller), chat_response, service, metrics)


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses=ERRORS | json_lines([GenerateResponse, OllamaError]),
)
async def generate(
    body: GenerateRequest,
    caller: CallerDep,
    service: ServiceDep,
    pool: PoolDep,
    metrics: MetricsDep,
) -> Response:
    """Answer a prompt."""
    if not body.prompt:
        return switched(pool, body, generate_response)
    if not body.raw:
        await check_thinks(pool.catalog, body)
    return answered(body, generate_inference(body, caller), generate_response, service, metrics)


def answered(
    body: GenerationRequest,
    request: InferenceRequest,
    write: Write,
    service: InferenceService,
    metrics: Metrics,
) -> Response:
    formats = AnswerFormats(
        # The name is the one that the client knows.
        answer=lambda accepted: Answer(body.model or accepted.model, write, body.logprobs),
        stream=lambda accepted: Stream(Answer(body.model or accepted.model, write, body.logprobs)),
    )
    generator = Generator(service, metrics, [request], formats)
    return generator.stream() if body.stream else generator.answer()


def switched(pool: ModelPoolManager, body: GenerationRequest, write: Write) -> Response:
    """Load the model without a question, or unload it."""

    async def done() -> bytes:
        if body.keep_alive == 0:
            await residence.let_go(pool, body.model)
            return bare(body.model, write, "unload")
        await residence.load(pool, body.model, body.keep_alive, "generate")
        return bare(body.model, write, "load")

    return WholeAnswer(done)


async def check_thinks(catalog: Catalog, body: GenerationRequest) -> None:
    """Raises BadRequest where thinking is asked of a model that does not think."""
    if not body.think or not body.model:
        return
    entry = await asyncio.to_thread(catalog.find, body.model)
    known = await asyncio.to_thread(read_capabilities, entry)
    if known is not None and not known.reasoning:
        raise BadRequest(f"The model '{body.model[:200]}' does not support thinking.")
