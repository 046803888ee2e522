"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from typing import get_args

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.anthropic.answering import Answering
from mlx_server.api.anthropic.answers import MessageAnswer
from mlx_server.api.anthropic.prompts import chat_prompt
from mlx_server.api.anthropic.streams import MessageStream
from mlx_server.api.anthropic.usage import is_marked
from mlx_server.api.anthropic.wire import documented
from mlx_server.api.generation import Accepted, AnswerFormats, Generator
from mlx_server.api.http.dependencies import (
    CallerDep,
    MetricsDep,
    PoolDep,
    ServiceDep,
    SettingsDep,
)
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.sampling import left_to_model, with_greedy
from mlx_server.engine.protocol import Sampling
from mlx_server.schemas.anthropic.requests import CountTokensRequest, MessagesRequest
from mlx_server.schemas.anthropic.responses import EventBody, Message, MessagesError, TokenCount
from mlx_server.schemas.internal import Caller, Constraint, InferenceRequest
from mlx_server.services import tokens

router = APIRouter(prefix="/v1/messages", route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 429, 500, 503, 504)
EVENTS = event_stream([*get_args(EventBody), MessagesError])


@router.post("", response_model=Message, responses=ERRORS | EVENTS)
async def create_message(
    body: MessagesRequest,
    caller: CallerDep,
    service: ServiceDep,
    settings: SettingsDep,
    metrics: MetricsDep,
) -> Response:
    """Answer a conversation."""
    request = to_inference(body, caller)
    marked = settings.caches_prefixes and is_marked(body)

    def answering(accepted: Accepted) -> Answering:
        return Answering(accepted, body, marked)

    formats = AnswerFormats(
        answer=lambda accepted: MessageAnswer(answering(accepted)),
        stream=lambda accepted: MessageStream(answering(accepted)),
    )
    generator = Generator(service, metrics, [request], formats)
    return generator.stream() if body.stream else generator.answer()


@router.post("/count_tokens", response_model=TokenCount, responses=ERRORS)
async def count_tokens(body: CountTokensRequest, caller: CallerDep, pool: PoolDep) -> Response:
    """How many tokens a prompt has."""
    prompt = msgspec.structs.replace(chat_prompt(body), use=None, thinking_budget=None)
    answer = TokenCount(input_tokens=await tokens.count(pool, body.model, prompt))
    return Response(answer.to_json(), media_type="application/json")


def to_inference(body: MessagesRequest, caller: Caller) -> InferenceRequest:
    prompt = chat_prompt(body)
    must_call = prompt.use is not None and prompt.use.choice != "auto"
    sampling = with_greedy(
        Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    )
    return InferenceRequest(
        model=body.model,
        prompt=prompt,
        caller=caller,
        sampling=sampling,
        unasked=left_to_model(sampling, body.model_fields_set),
        max_tokens=body.max_tokens,
        stop=tuple(filter(None, body.stop_sequences)),
        # A constraint binds text; an answer that must call has none.
        constraint=None if must_call else _constraint(body),
    )


def _constraint(body: MessagesRequest) -> Constraint | None:
    if (form := body.output_config.format) is not None:
        return Constraint("json_schema", form.schema_, "output_config.format")
    if body.output_format is not None:
        return Constraint("json_schema", body.output_format.schema_, "output_format")
    return None
