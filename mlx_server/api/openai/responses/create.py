"""`POST /v1/responses`, and how many tokens one would read."""

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.generation import AnswerFormats, Generator
from mlx_server.api.http.dependencies import CallerDep, MetricsDep, PoolDep, ServiceDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.openai.chat import to_inference
from mlx_server.api.openai.prompts import chat_prompt
from mlx_server.api.openai.responses.history import (
    Keeper,
    OwnerDep,
    RecordsDep,
    SealerDep,
    history,
    kept,
)
from mlx_server.api.openai.responses.thinking import Sealer
from mlx_server.api.openai.responses.tools import ToolBox
from mlx_server.api.openai.responses.translation import OUTPUTS, chat_request
from mlx_server.api.openai.responses.writer import ResponseWriter, Setting
from mlx_server.api.openai.wire import documented
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.schemas.openai.common import ErrorBody
from mlx_server.schemas.openai.responses.answers import InputTokens, ResponseBody, ResponseEvent
from mlx_server.schemas.openai.responses.items import Item
from mlx_server.schemas.openai.responses.requests import InputTokensRequest, ResponseRequest
from mlx_server.services import tokens

router = APIRouter(prefix="/v1", route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 429, 500, 503, 504)
SEALED = "reasoning.encrypted_content"


@router.post(
    "/responses",
    response_model=ResponseBody,
    responses=ERRORS | event_stream([ResponseEvent, ErrorBody]),
)
async def create_response(
    body: ResponseRequest,
    caller: CallerDep,
    owner: OwnerDep,
    service: ServiceDep,
    pool: PoolDep,
    metrics: MetricsDep,
    records: RecordsDep,
    sealer: SealerDep,
) -> Response:
    """Answer a conversation, which may go on from a stored one."""
    box = ToolBox.of(body.tools)
    said = await history(body, owner, records)
    items = said.items
    if body.truncation == "auto":
        items = await _fitted(body, items, box, sealer, pool)
    asked = chat_request(body, items, box, sealer)
    keeper = Keeper(records, owner, body, kept(said.new)) if body.store else None
    writer = ResponseWriter(
        Setting(
            body,
            box.named,
            seal=sealer.sealed if SEALED in body.include else None,
            keep=keeper.keep if keeper else None,
        )
    )
    formats = AnswerFormats(
        answer=writer.accepted,
        stream=writer.accepted,
        keep=writer.keep,
        failed=writer.failed,
        refused=writer.refused,
    )
    generator = Generator(service, metrics, [to_inference(asked, caller, 1)], formats)
    return generator.stream() if body.stream else generator.answer()


@router.post("/responses/input_tokens", response_model=InputTokens, responses=ERRORS)
async def count_input_tokens(
    body: InputTokensRequest,
    caller: CallerDep,
    owner: OwnerDep,
    pool: PoolDep,
    records: RecordsDep,
    sealer: SealerDep,
) -> Response:
    """How many tokens a response would read."""
    said = await history(body, owner, records)
    asked = chat_request(body, said.items, ToolBox.of(body.tools), sealer)
    count = await tokens.count(pool, body.model, chat_prompt(asked.messages, asked))
    answer = InputTokens(object="response.input_tokens", input_tokens=count)
    return Response(answer.to_json(), media_type="application/json")


async def _fitted(
    body: ResponseRequest, items: list[Item], box: ToolBox, sealer: Sealer, pool: ModelPoolManager
) -> list[Item]:
    """Without the fewest of the oldest that leave room for an answer."""

    async def fits(dropped: int) -> bool:
        asked = chat_request(body, _without(items, dropped), box, sealer)
        prompt = chat_prompt(asked.messages, asked)
        return await tokens.fits(pool, body.model, prompt, body.max_output_tokens)

    if len(items) < 2 or await fits(0):
        return items
    least, most = 1, len(items) - 1
    while least < most:
        middle = (least + most) // 2
        if await fits(middle):
            most = middle
        else:
            least = middle + 1
    return _without(items, least)


def _without(items: Sequence[Item], dropped: int) -> list[Item]:
    """Messages of the system stay, and no call's output does without its call."""
    left = [
        item
        for index, item in enumerate(items)
        if index >= dropped or item.role in ("system", "developer")
    ]
    calls = {item.call_id for item in left if item.type not in OUTPUTS}
    return [item for item in left if item.type not in OUTPUTS or item.call_id in calls]
