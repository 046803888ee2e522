"""Fetches and removes models: `/api/pull`, `/api/delete`; and what is not done here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256

from fastapi import APIRouter, Depends
from starlette.responses import Response

from mlx_server.api.http.dependencies import (
    AdminDep,
    CatalogDep,
    PullsDep,
    SettingsDep,
    authenticated,
)
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import json_lines
from mlx_server.api.http.streaming import StreamedAnswer, WholeAnswer
from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.ollama.wire import documented
from mlx_server.errors import BadRequest
from mlx_server.models.store.catalog import LATEST
from mlx_server.models.store.pulls import PullManager
from mlx_server.models.store.removal import plan_removal, remove
from mlx_server.models.store.transfer import Progress
from mlx_server.schemas.ollama.common import OllamaError
from mlx_server.schemas.ollama.models import ModelDelete, ModelPull, PullProgress

SUCCESS = PullProgress(status="success")

router = APIRouter(
    prefix="/api", dependencies=[AdminDep], route_class=JsonRoute, strict_content_type=False
)
refused = APIRouter(prefix="/api", dependencies=[Depends(authenticated)], include_in_schema=False)


@router.post(
    "/pull",
    response_model=PullProgress,
    responses=documented(400, 401, 403, 404, 413, 503) | json_lines([PullProgress, OllamaError]),
)
async def pull(body: ModelPull, pulls: PullsDep) -> Response:
    """Fetch a model, and tell of the progress."""
    name = body.model.removesuffix(LATEST)
    if body.stream:
        # A stopping server does not wait: downloads resume.
        return StreamedAnswer(_progress(pulls, name), grace=0.0)

    async def whole() -> bytes:
        async with pulls.follow(name) as reports:
            async for _ in reports:
                pass
        return SUCCESS.to_json()

    return WholeAnswer(whole)


@router.delete(
    "/delete", response_class=Response, responses=documented(400, 401, 403, 404, 413, 503)
)
async def delete(body: ModelDelete, catalog: CatalogDep, settings: SettingsDep) -> Response:
    """Remove a model from the disk, unless a server has it loaded."""
    entry = await asyncio.to_thread(catalog.find, body.model)
    removal = await asyncio.to_thread(plan_removal, entry, settings.models_folder)
    try:
        await asyncio.to_thread(remove, removal, settings.home)
    finally:
        catalog.refresh()
    return Response()


@refused.post("/create")
@refused.post("/copy")
@refused.post("/push")
@refused.post("/blobs/{digest}")
async def refuse() -> Response:
    raise BadRequest(
        "This server makes, copies and publishes no models: pull them, and give them other names "
        "with the setting `aliases`.",
        code="unsupported",
    )


@asynccontextmanager
async def _progress(
    pulls: PullManager, name: str
) -> AsyncIterator[AsyncIterator[list[StreamEvent]]]:
    async with pulls.follow(name) as reports:
        yield _lines(name, reports)


async def _lines(name: str, reports: AsyncIterator[Progress]) -> AsyncIterator[list[StreamEvent]]:
    digest = f"sha256:{sha256(name.encode()).hexdigest()}"
    async for progress in reports:
        yield [StreamEvent(_line(progress, digest).to_json())]
    yield [StreamEvent(SUCCESS.to_json())]


def _line(progress: Progress, digest: str) -> PullProgress:
    if not progress.total:
        return PullProgress(status="pulling manifest")
    return PullProgress(
        status=f"pulling {digest[7:19]}",
        digest=digest,
        total=progress.total,
        completed=progress.done,
    )
