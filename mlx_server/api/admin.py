"""What an operator asks for: the models with their engines and memory, and the loop's lag."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Depends
from starlette.responses import Response

from mlx_server.api.dependencies import CatalogDep, MetricsDep, PoolDep, authenticated
from mlx_server.api.errors import documented
from mlx_server.models.catalog import ModelEntry
from mlx_server.models.slot import ModelStatus

router = APIRouter(prefix="/admin", dependencies=[Depends(authenticated)])


@router.get("/models", responses=documented(401))
async def list_models(catalog: CatalogDep, pool: PoolDep) -> Response:
    """Every model that can be served, with its state, process, memory and requests."""
    entries = await asyncio.to_thread(catalog.entries)
    statuses = {status.id: status for status in pool.statuses()}
    return _json(
        {"models": [_described(entry, statuses.get(entry.id)) for entry in entries]},
    )


@router.get("/stats", responses=documented(401))
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


def _described(entry: ModelEntry, status: ModelStatus | None) -> dict[str, Any]:
    """What the catalog knows of a model, and over it what its engine does."""
    known = {
        "aliases": entry.aliases,
        "source": entry.source,
        "path": str(entry.path) if entry.path else None,
        "size": entry.size,
        "model_type": entry.model_type,
    }
    status = status or ModelStatus(id=entry.id, state="absent")
    facts: dict[str, Any] = msgspec.to_builtins(status) | known
    facts["context_length"] = status.context_length or entry.context_length
    return facts


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
