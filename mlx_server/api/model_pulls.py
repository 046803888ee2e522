"""`POST /admin/models/pull`: fetch a model, and tell how far it is."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mlx_server.api.http.dependencies import AdminDep, PullsDep, SettingsDep
from mlx_server.api.http.failures import documented
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.http.streaming import StreamedAnswer, sse
from mlx_server.models.store.pulls import PullManager
from mlx_server.models.store.transfer import Progress
from mlx_server.schemas.admin import PullEvent, PullRequest
from mlx_server.schemas.openai.common import ErrorBody

router = APIRouter(
    prefix="/admin", dependencies=[AdminDep], route_class=JsonRoute, strict_content_type=False
)


@router.post(
    "/models/pull",
    # It says no content type of its own, so that the stream's is the only one described.
    response_class=StreamingResponse,
    responses=documented(400, 401, 403, 404, 413, 503) | event_stream([PullEvent, ErrorBody]),
)
async def pull_model(
    body: PullRequest, pulls: PullsDep, settings: SettingsDep, request: Request
) -> Response:
    """Fetch a model; server-sent events tell the progress, the last one success or the error.

    Who asks for a model that is being pulled follows that pull. It ends when nobody follows it,
    and goes on from there the next time.
    """
    # A stopping server does not wait for a download, which can be taken up again.
    return StreamedAnswer(_events(pulls, body.model), settings, request.state.request_id, grace=0.0)


@asynccontextmanager
async def _events(pulls: PullManager, model: str) -> AsyncIterator[AsyncIterator[bytes]]:
    async with pulls.follow(model) as news:
        yield _encoded(news)


async def _encoded(news: AsyncIterator[Progress]) -> AsyncIterator[bytes]:
    async for progress in news:
        yield _event(status=progress.stage, completed=progress.done, total=progress.total)
    yield _event(status="success")


def _event(**fields: Any) -> bytes:
    return sse(msgspec.json.encode(fields))
