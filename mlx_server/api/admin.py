"""The operator's API: pull, load, unload and remove models; statistics."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, cast

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response, StreamingResponse

from mlx_server.api.http.dependencies import (
    AdminDep,
    CatalogDep,
    HistoryDep,
    MetricsDep,
    PoolDep,
    PullsDep,
    RecentDep,
    SettingsDep,
)
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.http.streaming import StreamedAnswer, WholeAnswer
from mlx_server.api.http.wire import ApiProtocol, StreamEvent
from mlx_server.api.openai.wire import WIRE, documented
from mlx_server.api.reloading import Reloader
from mlx_server.models.pool.status import ModelStatus
from mlx_server.models.store.catalog import Catalog, ModelEntry
from mlx_server.models.store.pulls import PullManager, PullStatus
from mlx_server.models.store.removal import removal_of, remove
from mlx_server.models.store.transfer import Progress
from mlx_server.schemas.admin import (
    AdminHistory,
    AdminModel,
    AdminModelList,
    AdminReloaded,
    AdminRequests,
    AdminStats,
    LoadRequest,
    PullEvent,
    PullRequest,
    Removed,
)
from mlx_server.schemas.openai.common import ErrorBody
from mlx_server.services.history import INTERVAL
from mlx_server.telemetry.record import KEPT_REQUESTS

router = APIRouter(
    prefix="/admin", dependencies=[AdminDep], route_class=JsonRoute, strict_content_type=False
)
# Errors are OpenAI's; a stream's last event is marked as the last.
ADMIN = ApiProtocol(
    wire=replace(WIRE, end=b"", name="admin"), routers=(router,), prefixes=("/admin",)
)


@router.get("/models", response_model=AdminModelList, responses=documented(400, 401, 403, 413))
async def list_models(catalog: CatalogDep, pool: PoolDep, pulls: PullsDep) -> Response:
    """Every model that can be served, is being pulled, or has failed."""
    entries = {entry.id: entry for entry in await asyncio.to_thread(catalog.entries)}
    statuses = {status.id: status for status in pool.statuses()}
    pulled = {pull.model: pull for pull in pulls.statuses()}
    # A removed model matters only if some of it is left.
    asked = [id_ for id_, status in statuses.items() if status.state != "absent"]
    ids = dict.fromkeys((*entries, *asked, *pulled))
    models = [_described(i, entries.get(i), statuses.get(i), pulled.get(i)) for i in ids]
    return _json({"memory_budget": pool.planner.budget, "models": models})


@router.post(
    "/models/{model_id:path}/load",
    response_model=AdminModel,
    responses=documented(400, 401, 403, 404, 413, 503),
)
async def load_model(
    model_id: str, catalog: CatalogDep, pool: PoolDep, body: LoadRequest | None = None
) -> Response:
    """Load a model, making room for it; answers when it is ready."""

    async def loaded() -> bytes:
        draft = body.draft_model if body else None
        return await _encoded(catalog, await pool.load(model_id, draft))

    return WholeAnswer(loaded)


@router.post(
    "/models/{model_id:path}/unload",
    response_model=AdminModel,
    responses=documented(400, 401, 403, 404, 413),
)
async def unload_model(model_id: str, catalog: CatalogDep, pool: PoolDep) -> Response:
    """Unload a model once its requests finish; answers when its memory is free."""
    return await _shown(catalog, await pool.unload(model_id))


@router.post(
    "/models/{model_id:path}/pin",
    response_model=AdminModel,
    responses=documented(400, 401, 403, 404, 413),
)
async def pin_model(model_id: str, catalog: CatalogDep, pool: PoolDep) -> Response:
    """Keep a model in memory, once it is loaded, when others need room. Until the server ends."""
    return await _shown(catalog, await pool.pin(model_id, True))


@router.post(
    "/models/{model_id:path}/unpin",
    response_model=AdminModel,
    responses=documented(400, 401, 403, 404, 413),
)
async def unpin_model(model_id: str, catalog: CatalogDep, pool: PoolDep) -> Response:
    """Let a model make room for others again, and end when it is unused for long."""
    return await _shown(catalog, await pool.pin(model_id, False))


@router.delete(
    "/models/{model_id:path}",
    response_model=Removed,
    responses=documented(400, 401, 403, 404, 413, 503),
)
async def remove_model(model_id: str, catalog: CatalogDep, settings: SettingsDep) -> Response:
    """Remove a model, or what is left of one, from the disk, unless a server has it loaded."""
    removal = await asyncio.to_thread(removal_of, model_id, catalog)
    try:
        await asyncio.to_thread(remove, removal, settings.home)
    finally:
        catalog.refresh()
    return _json({"id": removal.id, "deleted": True})


@router.post(
    "/models/pull",
    # No media type of its own: only the stream's is documented.
    response_class=StreamingResponse,
    responses=documented(400, 401, 403, 404, 413, 503) | event_stream([PullEvent, ErrorBody]),
)
async def pull_model(body: PullRequest, pulls: PullsDep) -> Response:
    """Fetch a model. Server-sent events report progress, then success or the error. Requests for
    the same model share one download; it stops when nobody follows it, and a later request resumes
    it.
    """
    # A stopping server does not wait: downloads resume.
    return StreamedAnswer(_progress(pulls, body.model), grace=0.0)


@router.get("/requests", response_model=AdminRequests, responses=documented(400, 401, 403, 413))
async def requests(
    recent: RecentDep, limit: Annotated[int, Query(ge=0, le=KEPT_REQUESTS)] = KEPT_REQUESTS
) -> Response:
    """Requests in work, and the last that ended, newest first: those that asked a model, or were
    refused. No text.
    """
    ended = list(itertools.islice(recent.ended(), limit))
    return _json({"running": recent.running(), "ended": ended})


@router.get("/history", response_model=AdminHistory, responses=documented(400, 401, 403, 413))
async def history(history: HistoryDep, since: float = 0.0) -> Response:
    """Samples of the last hour, one each five seconds, of those after `since` (seconds since the
    epoch); oldest first.
    """
    return _json({"interval": INTERVAL, "samples": history.since(since)})


async def _reloader(request: Request) -> Reloader:
    return cast(Reloader, request.app.state.reloader)


@router.post("/reload", response_model=AdminReloaded, responses=documented(400, 401, 403, 413))
async def reload(reloader: Annotated[Reloader, Depends(_reloader)]) -> Response:
    """Read keys, rate limits, aliases, model folders, adapters and log levels again, as SIGHUP
    does. Wrong settings change nothing.
    """
    return _json(await reloader.reload())


@router.get("/stats", response_model=AdminStats, responses=documented(400, 401, 403, 413))
async def stats(metrics: MetricsDep) -> Response:
    """How late the event loop is, in seconds, over the last minute."""
    lag = metrics.loop_lag
    return _json(
        {
            "event_loop_lag_seconds": {
                "p50": lag.quantile(0.5),
                "p99": lag.quantile(0.99),
                "max": lag.quantile(1.0),
            }
        }
    )


@asynccontextmanager
async def _progress(
    pulls: PullManager, model: str
) -> AsyncIterator[AsyncIterator[list[StreamEvent]]]:
    async with pulls.follow(model) as reports:
        yield _pull_events(reports)


async def _pull_events(reports: AsyncIterator[Progress]) -> AsyncIterator[list[StreamEvent]]:
    async for progress in reports:
        yield [StreamEvent(msgspec.json.encode(_progress_body(progress)))]
    yield [StreamEvent(msgspec.json.encode({"status": "success"}))]


def _progress_body(progress: Progress) -> dict[str, Any]:
    return {"status": progress.stage, "completed": progress.done, "total": progress.total}


async def _shown(catalog: Catalog, status: ModelStatus) -> Response:
    return Response(await _encoded(catalog, status), media_type="application/json")


async def _encoded(catalog: Catalog, status: ModelStatus) -> bytes:
    entry = await asyncio.to_thread(catalog.find, status.id)
    return msgspec.json.encode(_described(entry.id, entry, status, None))


def _described(
    id_: str, entry: ModelEntry | None, status: ModelStatus | None, pull: PullStatus | None
) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(status or ModelStatus(id=id_, state="absent"))
    facts |= {
        "aliases": entry.aliases if entry else (),
        "source": entry.source if entry else None,
        "path": str(entry.path) if entry and entry.path else None,
        "size": entry.size if entry else None,
        "model_type": entry.model_type if entry else None,
    }
    facts["context_length"] = facts["context_length"] or (entry and entry.context_length)
    facts["download"] = _progress_body(pull.progress) if pull and not pull.error else None
    if pull and facts["state"] == "absent" and not (pull.error and entry):
        facts["state"] = "failed" if pull.error else "downloading"
        facts["reason"] = pull.error
    return facts


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
